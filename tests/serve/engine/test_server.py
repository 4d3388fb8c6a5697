# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with the endpoint plugin: the commands of docs/serving.md, then a load."""

from __future__ import annotations

import asyncio
import re
import shutil
from importlib import metadata

import httpx
import pytest

from benchmarks import vllm_server as server
from tests.serve.engine.guide import FLAGS, STATES, Guide, ask, commands, lay_out
from tests.serve.engine.zoo import PROMPTS

pytestmark = pytest.mark.vllm
COMMANDS = commands("in five commands")


@pytest.fixture(scope="module")
def guide(zoo, tmp_path_factory):
    """The server of the first command, with flags that a small CPU needs."""
    entry_points = metadata.entry_points(group="vllm.endpoint_plugins")
    assert "shira" in {entry.name for entry in entry_points}, "install shira: pip install -e ."
    folder = tmp_path_factory.mktemp("guide")
    lay_out(zoo, folder)
    (folder / "adapters" / "out").symlink_to(zoo.root / "a")
    env = server.environment(server.command_line_on_cpu(folder / "packages"))
    port = server.free_port()
    command = COMMANDS[0].strip() + f" {FLAGS} --port {port}"
    with server.running(
        ["bash", "-euc", f"exec env {command}"], port, folder / "log", cwd=folder, env=env
    ) as process:
        yield Guide(port, folder, env, process)


def test_the_five_commands_of_the_guide(guide, zoo):
    _, load_french, load_german, ask_french, ask_german = COMMANDS
    assert guide.shell(load_french)["nnz"] == zoo.adapters["a"].nnz
    assert guide.shell(load_german)["nnz"] == zoo.adapters["b"].nnz
    french, german = guide.shell(ask_french), guide.shell(ask_german)
    assert (french["model"], german["model"]) == ("french", "german")
    base = guide.post(
        "/v1/completions", model="base-model", prompt="the weather today", max_tokens=8,
        temperature=0,
    ).json()  # fmt: skip
    texts = [answer["choices"][0]["text"] for answer in (french, german, base)]
    assert len(set(texts)) == 3
    assert guide.listed()["switches"] == 3
    models = httpx.get(f"{guide.url}/v1/models").json()["data"]
    assert [(m["id"], m["parent"]) for m in models] == [
        ("base-model", None),
        ("french", "base-model"),
        ("german", "base-model"),
    ]


def test_under_load_every_answer_is_its_own_adapters(guide, zoo):
    """300 requests for three adapters and the base, 32 at a time, some streamed."""
    mix = guide.post("/v1/load_shira_adapter", name="mix", adapters={"french": 0.7, "german": -0.3})
    assert mix.status_code == 200
    before = guide.listed()["switches"]
    wanted = [(list(STATES)[(7 * i * i + i // 3) % 4], i % 3) for i in range(300)]

    async def main():
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=guide.url, timeout=120, limits=limits) as client:
            tasks = [
                ask(client, model, prompt, stream=i % 5 == 0)
                for i, (model, prompt) in enumerate(wanted)
            ]
            return await asyncio.gather(*tasks)

    answers = asyncio.run(main())
    for (model, prompt), (named, tokens) in zip(wanted, answers, strict=True):
        assert named == model
        assert tokens == zoo.answers[STATES[model]][prompt][0]
    listed = guide.listed()
    assert (listed["running"], listed["waiting"]) == (0, {})
    # one after another they would be 225; on a busy machine more of them lose their patience
    assert 4 <= listed["switches"] - before < 200, "not grouped"


def test_refusals_and_after_them_the_server_goes_on(guide, zoo):
    assert guide.post("/v1/activate_shira_adapter", name="french").status_code == 200
    damaged = guide.folder / "adapters" / "damaged"
    shutil.copytree(zoo.path("a"), damaged)
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    pickled = guide.folder / "adapters" / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    foreign = guide.folder / "adapters" / "foreign"
    other_base(zoo, foreign)
    for path, status in {
        "damaged": 400,
        "pickled": 400,
        "foreign": 400,
        "out": 403,
        "../base-model": 403,
        "nothing": 404,
    }.items():
        answer = guide.post("/v1/load_shira_adapter", name="bad", path=path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, status), error
        assert str(guide.folder) not in error["message"]
    assert guide.post("/v1/completions", model="bad", prompt=PROMPTS[0]).status_code == 404
    assert guide.post("/v1/load_shira_adapter", name="french", path="german").status_code == 409
    assert guide.post("/v1/responses", model="french", background=True).status_code == 400
    for scale in ("NaN", "1e999", "1e300", '"1"'):
        refused(
            guide, "load_shira_adapter", f'{{"name": "bad", "adapters": {{"french": {scale}}}}}'
        )
    for path in ("\\ud800", "\\u0000", "x" * 5000):
        refused(guide, "load_shira_adapter", f'{{"name": "bad", "path": "{path}"}}')
    refused(guide, "activate_shira_adapter", '{"name": "\\ud800"}')
    refused(guide, "completions", '{"model": "\\ud800", "prompt": "a"}', 404)
    refused(guide, "load_shira_adapter", " " * 100_000, 413)
    refused(guide, "completions", " " * 17 * 2**20, 413)
    assert guide.listed()["active"] == "french"

    async def both():
        async with httpx.AsyncClient(base_url=guide.url, timeout=60) as client:
            return [(await ask(client, model, 0))[1] for model in ("french", "base-model")]

    assert asyncio.run(both()) == [zoo.answers["a"][0][0], zoo.answers["base"][0][0]]


def refused(guide, route, body, status=400):
    answer = httpx.post(f"{guide.url}/v1/{route}", content=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status), error


def other_base(zoo, path):
    from shira.adapter import Adapter

    a = zoo.adapters["a"]
    marks = dict(a.metadata["base_fingerprint"])
    marks["lm_head.weight"] = "float32:0123456789abcdef"
    Adapter(dict(a.items()), {"base_fingerprint": marks}).save(path, format="peft")


def test_unload(guide, zoo):
    assert guide.post("/v1/unload_shira_adapter", name="french").status_code == 409  # part of mix
    for name in ("mix", "french"):
        assert guide.post("/v1/unload_shira_adapter", name=name).status_code == 200
        assert guide.post("/v1/completions", model=name, prompt=PROMPTS[0]).status_code == 404
    again = guide.post("/v1/load_shira_adapter", name="french", path="french")
    assert again.json()["digest"]


def test_a_worker_killed_in_the_middle(guide):
    """No answer, rather than a wrong one or none for ever; vLLM ends a server without workers."""
    import psutil

    async def main():
        async with httpx.AsyncClient(base_url=guide.url, timeout=60) as client:
            children = psutil.Process(guide.process.pid).children(recursive=True)
            named = [(child, " ".join([child.name(), *child.cmdline()])) for child in children]
            # a single worker lives in the core
            workers = [child for child, name in named if re.search("Worker|EngineCore", name)]
            asking = [
                asyncio.ensure_future(ask(client, ["german", "base-model"][i % 2], 0, tokens=100))
                for i in range(24)
            ]
            await asyncio.sleep(0.1)
            for worker in workers:
                worker.kill()
            return await asyncio.gather(*asking, return_exceptions=True)

    answers = asyncio.run(main())
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert failed, "no worker was killed"
    for error in failed:
        assert isinstance(error, httpx.TransportError) or re.search("50[03]|error", str(error))
    assert guide.process.wait(60) is not None


def test_the_key_of_the_server_covers_the_routes():
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from shira.serve.http import routes
    from shira.serve.vllm_endpoints import ShiraEndpoints

    app = FastAPI()
    ShiraEndpoints().attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    client = TestClient(app)
    for path in sorted(routes.OWN_PATHS):
        assert client.post(path, json={"name": "x"}).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert client.post(path, json={"name": "x"}, headers=key).status_code == 503  # no engine
    assert client.get(routes.LIST).status_code == 401
