# SPDX-License-Identifier: Apache-2.0
"""A thousand requests for eight adapters and the base, mixed in the batches of one server.

Meanwhile adapters are unloaded and loaded, under their own names and under each other's, and
requests are given up. Every answer must be transformers' with that adapter merged, or a 404 while
its name is gone. No part of the test run: ``python -m tests.serve.engine.load``, in the
environment of ``make test-vllm``; a line of JSON says what was seen. ``... load 1000 3`` has memory
for three of the adapters.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from benchmarks import vllm_server as server
from shira.adapter import Adapter
from tests.serve.engine.guide import FLAGS
from tests.serve.engine.zoo import (
    PROMPTS,
    TOKENS,
    answers,
    make_adapter,
    merged,
    save_merged,
    save_model,
    weights_of,
)

ADAPTERS, IN_FLIGHT, PATH = 8, 24, "/v1/completions"


def prepare(root: Path) -> dict[str, list[list[int]]]:
    """The base and the adapters on disk; what each answers to each prompt."""
    base = save_model(root / "base")
    weights, right = weights_of(base), {"base": [tokens for tokens, _ in answers(base)]}
    for seed in range(ADAPTERS):
        name, adapter = f"a{seed}", make_adapter(weights, 10 + seed)
        adapter.save(root / "adapters" / name, format="peft")
        folder = save_merged(root / f"merged-{seed}", base, merged(weights, (adapter, 1.0)))
        right[name] = [tokens for tokens, _ in answers(folder)]
    return right


async def load(url: str, right: dict[str, list[list[int]]], requests: int) -> Counter[str]:
    draw, seen, holds = (
        random.Random(0),
        Counter[str](),
        {f"a{i}": f"a{i}" for i in range(ADAPTERS)},
    )
    gate = asyncio.Semaphore(IN_FLIGHT)
    running = True

    async def ask(client: httpx.AsyncClient, i: int) -> None:
        async with gate:
            model, prompt = draw.choice(["base", *holds]), draw.randrange(len(PROMPTS))
            body = {"model": model, "prompt": PROMPTS[prompt], "max_tokens": TOKENS}
            body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
            before = holds.get(model, "base")
            asking = client.post(PATH, json=body)
            try:
                answer = await asyncio.wait_for(asking, 0.05 if i % 17 == 0 else 300)
            except TimeoutError:
                seen["given up"] += 1
                return
            after = holds.get(model, "base")
            if answer.status_code == 404:
                seen["while its name was gone"] += 1
                return
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["choices"][0]["token_ids"]
            assert tokens in [right[each][prompt] for each in {before, after} if each], (
                model,
                tokens,
            )
            seen["right"] += 1

    async def change(client: httpx.AsyncClient) -> None:
        while running:
            name = draw.choice(list(holds))
            answer = await client.post("/v1/unload_shira_adapter", json={"name": name})
            assert answer.status_code == 200, answer.text
            path = draw.choice(list(right)[1:])
            holds[name] = path
            answer = await client.post("/v1/load_shira_adapter", json={"name": name, "path": path})
            assert answer.status_code == 200, answer.text
            seen["replaced"] += 1
            await asyncio.sleep(0.2)

    limits = httpx.Limits(max_connections=IN_FLIGHT + 4)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        for name in holds:
            answer = await client.post("/v1/load_shira_adapter", json={"name": name, "path": name})
            assert answer.json()["rides"], answer.text
        changing = asyncio.ensure_future(change(client))
        await asyncio.gather(*(ask(client, i) for i in range(requests)))
        running = False
        await changing
        listed = (await client.get("/v1/shira_adapters")).json()
        assert (listed["running"], listed["riding"], listed["switches"]) == (0, {}, 0)
    return seen


def main(requests: int = 1000, fit: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        right = prepare(root)
        nbytes = 16 * max(Adapter.load(root / "adapters" / name).nnz for name in list(right)[1:])
        port = server.free_port()
        command = ["vllm", "serve", str(root / "base"), "--served-model-name", "base"]
        command += ["--worker-extension-cls", "shira.serve.vllm.ShiraWorkerExtension"]
        command += ["--skip-tokenizer-init", "--max-num-seqs", "16", "--port", str(port)]
        env = server.environment(
            server.command_line_on_cpu(root / "packages"),
            VLLM_PLUGINS="shira",
            SHIRA_ADAPTERS=str(root / "adapters"),
            SHIRA_MIXING="on",
            **({"SHIRA_MAX_ADAPTER_MEMORY": str(fit * nbytes)} if fit else {}),
        )
        with server.running([*command, *FLAGS.split()], port, root / "log", env=env):
            began = time.perf_counter()
            seen = asyncio.run(load(f"http://127.0.0.1:{port}", right, requests))
            print(json.dumps({**seen, "seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
