# SPDX-License-Identifier: Apache-2.0
"""``shira serve`` as docs/serving.md starts it: a worker is killed, and the server comes back.

With mixed batches, on two workers: requests for several adapters run side by side.
"""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
import pytest
import torch

from benchmarks import vllm_server as server
from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.support import Support
from tests.serve.engine.guide import FLAGS, STATES, Guide, ask, commands, fork_engines, lay_out
from tests.serve.engine.zoo import PROMPTS, TOKENS

pytestmark = pytest.mark.vllm
SECTION = "A server that comes back"


@pytest.fixture
def guide(zoo, tmp_path):
    lay_out(zoo, tmp_path)
    support = Support((128,), torch.arange(40))
    norm = {"model.layers.0.input_layernorm.weight": SparseDelta(support, torch.full((40,), 0.5))}
    Adapter(norm).save(tmp_path / "adapters" / "norm", format="peft")
    packages = server.command_line_on_cpu(tmp_path / "packages")
    fork_engines(packages)
    env = server.environment(packages, VLLM_CPU_OMP_THREADS_BIND="0|1", SHIRA_MIXING="on")
    port = server.free_port()
    (command,) = commands(SECTION)
    two = "--tensor-parallel-size 2 --distributed-executor-backend mp"
    command = f"exec {command.strip()} {FLAGS} {two} --port {port}"
    log = tmp_path / "log"
    with server.running(["bash", "-euc", command], port, log, cwd=tmp_path, env=env) as process:
        yield Guide(port, tmp_path, env, process)


async def all_answers(url):
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return {state: (await ask(client, state, 0))[1] for state in STATES}


async def many_answers(url, zoo):
    """60 requests at once for three adapters and the base; some are streamed, some given up."""
    wanted = [(list(STATES)[(7 * i * i + i // 3) % 4], i % 3) for i in range(60)]
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        asking = [
            asyncio.ensure_future(
                ask(client, model, prompt, stream=i % 5 == 0, tokens=TOKENS if i % 6 else 100)
            )
            for i, (model, prompt) in enumerate(wanted)
        ]
        await asyncio.wait([asking[1]])
        for task in asking[::6]:
            task.cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
    given_up = [isinstance(answer, asyncio.CancelledError) for answer in answers]
    assert sum(given_up) > 3
    for (model, prompt), answer, gone in zip(wanted, answers, given_up, strict=True):
        if not gone:
            right = zoo.answers[STATES[model]][prompt][0]
            assert (answer[0], answer[1][:TOKENS]) == (model, right)


def workers(guide):
    children = psutil.Process(guide.process.pid).children(recursive=True)
    return [each for each in children if "VLLM::Worker" in " ".join([each.name(), *each.cmdline()])]


def ask_until_it_is_back(guide):
    """What a client sees who keeps asking: errors, at last an answer."""
    seen, end = [], time.monotonic() + 300
    body = {"model": "german", "prompt": PROMPTS[1], "max_tokens": TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    while time.monotonic() < end:
        try:
            answer = guide.post("/v1/completions", **body)
        except httpx.TransportError as error:
            seen.append(error)
        else:
            if answer.status_code == 200:
                return seen, answer.json()["choices"][0]["token_ids"]
            seen.append(answer)
        time.sleep(0.3)
    raise AssertionError(f"it did not come back:\n{(guide.folder / 'log').read_text()[-4000:]}")


def test_a_killed_worker(guide, zoo):
    expected = {name: zoo.answers[state][0][0] for name, state in STATES.items()}
    for name in ("french", "german"):
        assert guide.post("/v1/load_shira_adapter", name=name, path=name).status_code == 200
    mix = {"french": 0.7, "german": -0.3}
    assert guide.post("/v1/load_shira_adapter", name="mix", adapters=mix).status_code == 200
    assert asyncio.run(all_answers(guide.url)) == expected
    asyncio.run(many_answers(guide.url, zoo))
    listed = guide.listed()
    assert (listed["switches"], listed["riding"], listed["active"]) == (0, {}, None)
    assert [each["rides"] for each in listed["data"]] == [True] * 3
    mine = guide.post(
        "/v1/completions", model="french", prompt="the", vllm_xargs={"shira_adapter": "german"}
    )
    assert mine.status_code == 400, mine.text
    assert guide.post("/v1/load_shira_adapter", name="norm", path="norm").json()["why_not"]
    assert guide.post("/v1/activate_shira_adapter", name="norm").status_code == 200
    before = guide.listed()

    first = workers(guide)
    assert len(first) == 2
    first[1].kill()
    seen, tokens = ask_until_it_is_back(guide)
    assert tokens == zoo.answers["b"][1][0]
    assert seen, "nobody noticed"
    for each in seen:  # an error of the API's form or no connection, never a wrong answer
        if isinstance(each, httpx.Response):
            assert each.status_code >= 500
            assert set(each.json()["error"]) == {"message", "type", "param", "code"}
    after = guide.listed()
    by_name = [sorted(each["data"], key=lambda adapter: adapter["id"]) for each in (after, before)]
    assert by_name[0] == by_name[1]  # combinations are made last
    # norm, which cannot ride, was active before the first request, and gave way to it
    assert (after["active"], after["switches"]) == (None, 2)
    assert after["not_restored"] == {}
    assert asyncio.run(all_answers(guide.url)) == expected

    second = workers(guide)
    assert len(second) == 2
    everyone = psutil.Process(guide.process.pid).children(recursive=True)
    guide.process.terminate()
    assert guide.process.wait(60) == 0
    _, left = psutil.wait_procs([*everyone, *first], timeout=10)
    assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]
