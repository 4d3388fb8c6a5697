# SPDX-License-Identifier: Apache-2.0
"""Timing in turns, and what is made of it."""

from __future__ import annotations

import hashlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from shira.adapter import Adapter
from shira.cli._switch_bench.contenders import (
    Limit,
    Ours,
    linear_around,
    peft_lora,
    peft_shira,
    shira_in_peft,
)
from shira.cli._switch_bench.scene import module_of
from shira.errors import MissingDependencyError
from shira.ops import native


class Times(NamedTuple):
    """Seconds of the runs of one contender."""

    samples: list[float]

    @property
    def best(self) -> float:
        """The fastest run."""
        return min(self.samples)

    @property
    def median(self) -> float:
        """The run in the middle."""
        return statistics.median(self.samples)


def in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Each contender once in every round, after one round that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                samples[name].append(time.perf_counter() - start)
    return {name: Times(taken) for name, taken in samples.items()}


def digest(module: nn.Module) -> str:
    """A hash of every bit of a module's parameters."""
    whole = hashlib.blake2b(digest_size=16)
    for parameter in module.parameters():
        data = parameter.detach().contiguous().view(-1).view(torch.uint8)
        whole.update(data.numpy().data)
    return whole.hexdigest()


def measure(adapters: Mapping[str, Adapter], module: nn.Module, repeats: int) -> dict[str, Any]:
    """`Switch` with these adapters on a module, beside the least that it could do.

    Returns:
        What was measured, as plain values: ``switch_seconds`` and ``limit_seconds`` of
        ``there_and_back`` (in with the first adapter and out again) and ``onwards`` (from one to
        the next; only with two or more), and whether the base came back bit for bit.
    """
    before = digest(module)
    start = time.perf_counter()
    ours = Ours(module, adapters)
    loading = time.perf_counter() - start
    runs: dict[str, Callable[[], object]] = {"there_and_back": ours.there_and_back}
    limits: dict[str, Times] = {}
    try:
        limit = Limit(ours)
        runs["limit there_and_back"] = limit.there_and_back
    except MissingDependencyError:
        limit = None
    times = in_turns(runs, repeats)
    if len(ours.names) > 1:
        runs = {"onwards": ours.onwards}
        if limit is not None:
            runs["limit onwards"] = limit.onwards
        times.update(in_turns(runs, repeats))
        ours.switch.deactivate()
    limits = {name.split()[1]: times.pop(name) for name in list(times) if name.startswith("limit")}
    return {
        "weights": sum(1 for _ in module.parameters()),
        "parameters": sum(p.numel() for p in module.parameters()),
        "entries": {name: adapter.nnz for name, adapter in adapters.items()},
        "kernels": native.load().why,
        "threads": torch.get_num_threads(),
        "load_seconds": loading,
        "switch_seconds": {name: _plain(t) for name, t in times.items()},
        "limit_seconds": {name: _plain(t) for name, t in limits.items()} or None,
        "base_equal_bit_for_bit": digest(module) == before,
    }


def compare(adapter: Adapter, dtype: torch.dtype, repeats: int) -> dict[str, Any] | None:
    """Merge and unmerge of one weight in PEFT beside ours, in turns.

    Args:
        adapter: Its largest matrix is taken.
        dtype: Of the weight.
        repeats: Rounds.

    Returns:
        Seconds by contender and the shape; None if PEFT is not installed or there is no matrix.
    """
    matrices = {name: d for name, d in adapter.items() if len(d.support.shape) == 2 and d.nnz}
    if importlib.util.find_spec("peft") is None or not matrices:
        return None
    name = max(matrices, key=lambda n: matrices[n].support.numel)
    delta, shape = matrices[name], matrices[name].support.shape
    r = max(1, round(delta.nnz / sum(shape)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs: dict[str, Callable[[], object]] = {
            "shira": Ours(
                module_of({"w": shape}, dtype), {"a": Adapter({"w": delta})}
            ).there_and_back,
            "shira_in_peft": shira_in_peft(_linear(shape, dtype), delta),
            "peft_shira": peft_shira(_linear(shape, dtype), delta),
            "peft_lora": peft_lora(_linear(shape, dtype), r),
        }
        times = in_turns(runs, repeats)
    return {
        "shape": list(shape),
        "entries": delta.nnz,
        "lora_rank": r,
        "seconds": {contender: _plain(t) for contender, t in times.items()},
    }


def _linear(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Linear:
    return linear_around(next(module_of({"w": shape}, dtype).parameters()))


def _plain(times: Times) -> dict[str, Any]:
    return {"best": times.best, "median": times.median, "samples": times.samples}
