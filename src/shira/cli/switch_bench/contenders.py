# SPDX-License-Identifier: Apache-2.0
"""Contenders of `shira switch-bench` and their timing; the benchmark of switching uses them too.

They are `Switch`, the least that it could do, and PEFT's SHiRA and LoRA on the same weights.
PEFT has no switch of its own: leaving an adapter is `unmerge`, entering one is `merge`. Both are
called on the layer itself, without the walk over the model that PEFT's own calls make besides.

Weights hold random bits of a small pool: switching does not look at values, and filling a billion
of them with fresh ones would take longer than the measurement.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.base import fingerprint
from shira.delta import SparseDelta
from shira.errors import ConfigError, MissingDependencyError
from shira.fusing.result import check_together
from shira.masks import random_support
from shira.ops import native
from shira.ops.patch import Patch
from shira.support import matrix_shape
from shira.switch import Switch
from shira.switch.targets import Target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shape_of(text: str) -> tuple[int, int]:
    """Return the shape that ``"4096x11008"`` is; refuse what is no two positive numbers."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text.lower())
    if found is None:
        raise ConfigError(f"a shape is written ROWSxCOLUMNS, as 4096x11008, not {text!r}")
    return int(found[1]), int(found[2])


def module_of(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> nn.Module:
    """Return a module whose parameters have these names and shapes; it computes nothing."""
    random = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    pool = (0.02 * random).to(dtype)  # as large as weights of language models are
    root = nn.Module()
    for name, shape in shapes.items():
        owner, *path, leaf = root, *name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        weight = torch.empty(tuple(shape), dtype=dtype)
        for piece in torch.split(weight.view(-1), pool.numel()):
            piece.copy_(pool[: piece.numel()])
        owner.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    return root


def random_adapter(shapes: Mapping[str, Sequence[int]], r: int, seed: int) -> Adapter:
    """Return ``r (m + n)`` random entries of each weight, as many as a LoRA has parameters."""
    deltas = {}
    for name, shape in shapes.items():
        k = min(r * sum(matrix_shape(shape)), torch.Size(shape).numel())
        support = random_support(tuple(shape), k, seed=seed, name=name)
        generator = torch.Generator().manual_seed(seed)
        deltas[name] = SparseDelta(support, torch.randn(k, generator=generator) * 0.02)
    return Adapter(deltas)


def shapes_in(adapters: Mapping[str, Adapter]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that adapters, which agree on them, are for."""
    for adapter in adapters.values():
        adapter.require_sparse("switch-bench")
    check_together([*adapters.values()], [*adapters], check_base=False)
    deltas = (delta for adapter in adapters.values() for delta in adapter.items())
    return {name: delta.support.shape for name, delta in deltas}


class Switching:
    """A `Switch` between adapters on a module."""

    def __init__(self, module: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.module = module
        self.switch = Switch(module)
        self.names = list(adapters)
        self._around = itertools.cycle(self.names)
        for name, adapter in adapters.items():
            self.switch.load(name, adapter, check_base=False)

    def there_and_back(self) -> None:
        """Activate the first adapter and deactivate it: what PEFT's merge and unmerge are."""
        self.switch.activate(self.names[0])
        self.switch.deactivate()

    def onwards(self) -> None:
        """Activate the next adapter, after the last the first."""
        self.switch.activate(next(self._around))


def limits(switching: Switching) -> dict[str, Callable[[], None]]:
    """Return the least that the two ways of switching could do, by name; needs compiled kernels.

    That is one word of each touched cache line, read and written: twice those of the first adapter,
    or once those of the first or the second. Beside it as many bytes are read as the offsets,
    originals and replacement values have.
    """
    loaded = native.load()
    if loaded.library is None:
        raise MissingDependencyError(loaded.why)
    touch, switch = loaded.library.touch, switching.switch
    plans = []
    for name in switching.names[:2]:
        with switch.using(name):
            plans.append(switch._weights.state.plan)
    alone, both = _touched(plans[:1]), _touched(plans)
    stream = torch.zeros(max((words for *_, words in both), default=0), dtype=torch.int64)

    def walk(steps: list[tuple[Tensor, Tensor, int]]) -> None:
        for weight, lines, words in steps:
            touch(weight.data, lines, stream[:words])

    return {"there_and_back": partial(walk, alone * 2), "onwards": partial(walk, both)}


def _touched(plans: Sequence[Mapping[Target, Patch]]) -> list[tuple[Tensor, Tensor, int]]:
    """Return weights, their 64-byte lines that patches touch, and the patches' 8-byte words."""
    found = []
    for target in dict.fromkeys(target for plan in plans for target in plan):
        patches, size = [plan[target] for plan in plans if target in plan], target.weight.itemsize
        words = sum(p.offsets.nbytes + p.originals.nbytes + p.replacement.nbytes for p in patches)
        offsets = torch.cat([patch.offsets.long() for patch in patches])
        lines: Tensor = torch.unique(offsets * size // 64)  # type: ignore[no-untyped-call]
        found.append((target.weight, lines.to(torch.int32), words // 8))
    return found


def merge_and_unmerge(layer: Any) -> None:
    """Put a layer's adapter into its weight and take it out again."""
    with torch.no_grad():
        layer.merge()
        layer.unmerge()


def peft_shira(linear: nn.Linear, delta: SparseDelta, dtype: torch.dtype = torch.float32) -> Any:
    """Return a layer of PEFT's own SHiRA with these entries.

    `get_peft_model` makes its values float32 unless told not to.
    """
    from peft.tuners.shira.config import ShiraConfig
    from peft.tuners.shira.model import ShiraModel

    config = ShiraConfig(r=1, target_modules=["layer"])
    config.mask_fn = None  # type: ignore[assignment]  # its own takes seconds
    layer = _adapted(ShiraModel, config, linear, delta.values.to(dtype))
    layer.shira_indices["default"] = delta.support.coordinates()
    return layer


def shira_in_peft(linear: nn.Linear, delta: SparseDelta) -> Any:
    """Return the same with shira's layer, which PEFT calls in the place of its own."""
    from shira.tuner import ShiraConfig, ShiraModel

    config = ShiraConfig(target_modules=["layer"], density=delta.support.density)
    config.mask_fn = lambda base_layer, r, **kwargs: delta.support
    return _adapted(ShiraModel, config, linear, delta.values.clone())


def _adapted(model: Any, config: Any, linear: nn.Linear, values: Tensor) -> Any:
    layer = model(nn.ModuleDict({"layer": linear}), {"default": config}, "default").model["layer"]
    layer.shira_weight["default"] = nn.Parameter(values, requires_grad=False)
    return layer


def peft_lora(linear: nn.Linear, r: int) -> Any:
    """Return a layer of PEFT's LoRA of a rank; merge is what others call fuse."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=["layer"], init_lora_weights=False)
    model: Any = get_peft_model(nn.ModuleDict({"layer": linear}), config)  # type: ignore[arg-type]
    layer = model.base_model.model["layer"]
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(0.01)
    return layer


def linear_around(weight: Tensor) -> nn.Linear:
    """Return a linear layer on this very memory."""
    rows, cols = weight.shape
    linear = nn.Linear(cols, rows, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Run each contender once in every round, after one that is not counted; seconds by name."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                samples[name].append(time.perf_counter() - start)
    return {
        name: {"best": min(taken), "median": statistics.median(taken), "samples": taken}
        for name, taken in samples.items()
    }


def digest(module: nn.Module) -> list[str]:
    """Return hashes of every bit of a module's parameters."""
    return [fingerprint(parameter) for parameter in module.parameters()]


def measure(adapters: Mapping[str, Adapter], module: nn.Module, repeats: int) -> dict[str, Any]:
    """Time `Switch` with these adapters on a module, beside the least that it could do."""
    before = digest(module)
    start = time.perf_counter()
    ours = Switching(module, adapters)
    loading = time.perf_counter() - start
    runs = {"there_and_back": ours.there_and_back, "onwards": ours.onwards}
    if len(adapters) == 1:
        del runs["onwards"]
    least = {} if native.load().library is None else limits(ours)
    times = {
        way: in_turns({"switch": run, "limit": least[way]} if least else {"switch": run}, repeats)
        for way, run in runs.items()
    }
    ours.switch.deactivate()
    return {
        "weights": sum(1 for _ in module.parameters()),
        "parameters": sum(p.numel() for p in module.parameters()),
        "entries": {name: adapter.nnz for name, adapter in adapters.items()},
        "kernels": native.load().why,
        "threads": torch.get_num_threads(),
        "load_seconds": loading,
        "switch_seconds": {way: taken["switch"] for way, taken in times.items()},
        "limit_seconds": {way: taken["limit"] for way, taken in times.items()} if least else None,
        "base_equal_bit_for_bit": digest(module) == before,
    }


def compare(adapter: Adapter, dtype: torch.dtype, repeats: int) -> dict[str, Any] | None:
    """Time merging and unmerging one weight in PEFT beside `Switch`, in turns.

    The largest matrix of the adapter is taken; None if there is none, or PEFT is not installed.
    """
    matrices = {name: d for name, d in adapter.items() if len(d.support.shape) == 2 and d.nnz}
    if importlib.util.find_spec("peft") is None or not matrices:
        return None
    delta = max(matrices.values(), key=lambda delta: delta.support.numel)
    shape = delta.support.shape
    r = max(1, round(delta.nnz / sum(shape)))
    module, *others = (module_of({"w": shape}, dtype) for _ in range(4))
    ours = Switching(module, {"a": Adapter({"w": delta})})
    linears = [linear_around(next(other.parameters())) for other in others]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = {
            "shira_in_peft": shira_in_peft(linears[0], delta),
            "peft_shira": peft_shira(linears[1], delta),
            "peft_lora": peft_lora(linears[2], r),
        }
        runs = {name: partial(merge_and_unmerge, layer) for name, layer in layers.items()}
        times = in_turns({"shira": ours.there_and_back, **runs}, repeats)
    return {"shape": list(shape), "entries": delta.nnz, "lora_rank": r, "seconds": times}
