# SPDX-License-Identifier: Apache-2.0
"""Suite ``merging``: an adapter into a sharded checkpoint on disk, and back out of it.

A random Llama-shaped model in bf16 is saved in several safetensors shards (1 GB in all by default),
with a random adapter of 2 % of all linear layers. Four contenders take turns, each in a process of
its own that has done the same on a tiny checkpoint first:

- ``copy``: the files copied and flushed to the disk, nothing else. The floor.
- ``merge``: ``shira.convert.merge`` with an undo file.
- ``unmerge``: ``shira.convert.unmerge`` of what that wrote.
- ``in-memory``: the model loaded by transformers, the entries overwritten, the model saved. It
  neither checks the base nor keeps an undo file, nor waits until its files are on the disk.

Seconds include loading the adapter. Memory is the highest resident set above that before the work
began; mapped pages of files count, as the operating system counts them.

Checked: every tensor that ``merge`` wrote has the bits of what ``in-memory`` wrote, and every file
that ``unmerge`` wrote the bytes of the base's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, memory, report
from benchmarks.timing import ratios, summary

NAME = "merging"
SEED = 42
CONTENDERS = ("copy", "merge", "unmerge", "in-memory")
ALLOWED = 300_000_000
"""Bytes that a merge may use beside the largest tensor: what was promised."""


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    hidden: int = field(default=2048, metadata={"help": "hidden size of the model"})
    intermediate: int = field(default=5632, metadata={"help": "size of its MLPs"})
    layers: int = field(default=8, metadata={"help": "its layers"})
    vocab: int = field(default=32000, metadata={"help": "its vocabulary"})
    density: float = field(default=0.02, metadata={"help": "share of each linear layer's entries"})
    shard: str = field(default="256MB", metadata={"help": "largest shard"})
    repeats: int = field(default=3, metadata={"help": "timed rounds"})
    memory: bool = field(
        default=True,
        metadata={"help": "measure memory, with each contender in a process of its own"},
    )
    folder: str = field(default="", metadata={"help": "where to work; default: a temporary one"})


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Make the checkpoints, time, check; the whole JSON document of the suite."""
    surroundings = environment.describe()
    with tempfile.TemporaryDirectory(dir=settings.folder or None, prefix="shira-merging-") as where:
        root = Path(where)
        progress("merging: making the checkpoints")
        about = _make(settings, root / "large")
        tiny = Settings(hidden=64, intermediate=96, layers=1, vocab=64, shard="20KB")
        _make(tiny, root / "tiny")
        neighbours = environment.Neighbours()
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for turn in range(settings.repeats):
            for name in CONTENDERS:  # unmerge takes what merge wrote, so their order stays
                progress(f"merging: round {turn + 1} of {settings.repeats}, {name}")
                samples[name].append((_apart if settings.memory else _timed)(name, root))
            if not turn:
                progress("merging: comparing the answers")
                answers = check_answers(root / "large")
        surroundings["cpu_share_of_others"] = neighbours.share()
    results = {name: _figures(runs, samples["copy"]) for name, runs in samples.items()}
    peak = results["merge"]["peak_bytes"]
    about["promised_peak_bytes"] = about["largest_tensor_bytes"] + ALLOWED
    about["promise_kept"] = None if peak is None else peak < about["promised_peak_bytes"]
    body = {"answers": answers, "results": {"checkpoint": about, "contenders": results}}
    return report.document(NAME, asdict(settings), surroundings, body)


def _make(settings: Settings, folder: Path) -> dict[str, Any]:
    """A checkpoint and an adapter for it; what they are like."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from shira import Adapter, SparseDelta
    from shira.base import fingerprint
    from shira.masks import random_support

    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder / "base", max_shard_size=settings.shard)
    deltas, prints = {}, {}
    for name, weight in model.named_parameters():
        if not name.endswith("proj.weight"):
            continue
        k = round(settings.density * weight.numel())
        support = random_support(tuple(weight.shape), k, seed=SEED, name=name)
        deltas[name] = SparseDelta(support, torch.randn(k) * 1e-3)
        prints[name] = fingerprint(weight.detach().view(-1)[support.indices])
    adapter = Adapter(deltas, {"base_fingerprint": prints})
    adapter.save(folder / "adapter", format="peft")
    shards = list((folder / "base").glob("*.safetensors"))
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "shards": len(shards),
        "bytes": sum(shard.stat().st_size for shard in shards),
        "largest_tensor_bytes": max(2 * weight.numel() for weight in model.parameters()),
        "adapter_entries": adapter.nnz,
    }


def _apart(name: str, root: Path) -> dict[str, float]:
    """Run one contender in a process of its own."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.merging", name, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, root: Path) -> dict[str, float | None]:
    """Seconds and peak memory of one contender, after it has worked on the tiny checkpoint."""
    _WORK[name](root / "tiny")
    start = memory.settled_rss()
    timed = _timed(name, root)
    peak = memory._peak_rss()
    known = start is not None and peak is not None
    return {**timed, "peak_bytes": peak - start if known else None}


def _timed(name: str, root: Path) -> dict[str, float | None]:
    begun = time.perf_counter()
    _WORK[name](root / "large")
    return {"seconds": time.perf_counter() - begun, "peak_bytes": None}


def _copy(folder: Path) -> None:
    from shira.checkpoints.entries import copy_file

    shutil.rmtree(folder / "copy", ignore_errors=True)
    (folder / "copy").mkdir()
    for path in (folder / "base").iterdir():
        for _ in copy_file(path, folder / "copy" / path.name):
            pass


def _merge(folder: Path) -> None:
    from shira.convert import merge

    merge(folder / "adapter", folder / "base", folder / "merged", undo=folder / "undo",
          overwrite=True)  # fmt: skip


def _unmerge(folder: Path) -> None:
    from shira.convert import unmerge

    if not (folder / "undo").exists():
        _merge(folder)
    unmerge(folder / "merged", folder / "undo", folder / "back", overwrite=True)


def _in_memory(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from shira import Adapter
    from shira.base import replacement

    adapter = Adapter.load(folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in adapter.items():
            flat, where = parameters[name].view(-1), delta.support.indices
            flat[where] = replacement(flat[where], delta.values)
    shard = json.loads((folder / "base" / "model.safetensors.index.json").read_text())
    count = len(set(shard["weight_map"].values()))
    size = sum(p.numel() for p in parameters.values()) * 2 // count
    shutil.rmtree(folder / "memory", ignore_errors=True)
    model.save_pretrained(folder / "memory", max_shard_size=size)


_WORK: dict[str, Callable[[Path], None]] = {
    "copy": _copy,
    "merge": _merge,
    "unmerge": _unmerge,
    "in-memory": _in_memory,
}


def check_answers(folder: Path) -> dict[str, Any]:
    """Bits of the merged tensors, and bytes of the restored files.

    Raises:
        RuntimeError: If they differ.
    """
    merged, wanted = _tensors(folder / "merged"), _tensors(folder / "memory")
    if merged != wanted:
        raise RuntimeError("merging on disk and in memory give other bits")
    if merged == _tensors(folder / "base"):
        raise RuntimeError("merging changed nothing")
    if _files(folder / "back") != _files(folder / "base"):
        raise RuntimeError("unmerging does not give the base's bytes")
    return {
        "merged_tensors_equal_bit_for_bit": len(merged),
        "restored_files_equal_byte_for_byte": len(_files(folder / "base")),
    }


def _tensors(folder: Path) -> dict[str, str]:
    """A digest of each tensor's bits, one tensor in memory at a time."""
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                bits = file.get_tensor(name).view(torch.uint8).numpy()
                found[name] = hashlib.sha256(bits).hexdigest()
    return found


def _files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _figures(runs: list[dict[str, float]], floor: list[dict[str, float]]) -> dict[str, Any]:
    seconds, copying = ([run["seconds"] for run in of] for of in (runs, floor))
    peaks = [run["peak_bytes"] for run in runs]
    return {
        "seconds": {**summary(seconds), "samples": seconds},
        "over_copy": ratios(seconds, copying),
        "peak_bytes": None if None in peaks else max(peaks),
    }


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    about = result["results"]["checkpoint"]
    table = report.Table(
        f"Merging {about['adapter_entries'] / 1e6:.1f} million entries into "
        f"{about['bytes'] / 1e9:.2f} GB in {about['shards']} shards",
        ["what", "seconds", "x copy median [quartiles]", "peak MB"],
        notes=[
            f"Largest tensor: {about['largest_tensor_bytes'] / 1e6:.0f} MB. Merged tensors have "
            "the bits of loading, merging in memory and saving; restored files those of the base.",
            *report.busy_note(result),
        ],
    )
    for name, row in result["results"]["contenders"].items():
        ratio, peak = row["over_copy"], row["peak_bytes"]
        table.rows.append(
            [
                name,
                f"{row['seconds']['median']:.2f}",
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                "-" if peak is None else f"{peak / 1e6:.0f}",
            ]
        )
    return [table]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
