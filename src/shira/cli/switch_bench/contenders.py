# SPDX-License-Identifier: Apache-2.0
"""Contenders of `shira switch-bench` and their timing; the benchmark of switching uses them too.

They are `Switch`, the least that it could do, and PEFT's SHiRA and LoRA on the same weights.
PEFT has no switch of its own: leaving an adapter is `unmerge`, entering one is `merge`. Both are
called on the layer itself, without the walk over the model that PEFT's own calls make besides.

Weights hold random bits of a small pool: switching does not look at values, and filling a billion
of them with fresh ones would take longer than the measurement.
"""

from __future__ import annotations

import hashlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, MissingDependencyError
from shira.masks import random_support
from shira.ops import native
from shira.ops.patch import Patch
from shira.support import matrix_shape
from shira.switch import Switch
from shira.switch.targets import Target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Runs = dict[str, Callable[[], object]]


def shape_of(text: str) -> tuple[int, int]:
    """Return the shape that ``"4096x11008"`` is.

    Raises:
        ConfigError: If it is no two positive numbers.
    """
    rows, _, cols = text.lower().partition("x")
    known = rows.isdecimal() and cols.isdecimal() and len(text) < 20  # within 64 bits
    if not (known and int(rows) and int(cols)):
        raise ConfigError(f"a shape is written ROWSxCOLUMNS, as 4096x11008, not {text!r}")
    return int(rows), int(cols)


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


def shapes_in(adapters: Iterable[Adapter]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that adapters are for.

    Raises:
        AdapterError: If two of them take a weight for one of another shape, or one has whole
            tensors, which are no k entries.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        adapter.require_sparse("switch-bench")
        for name, delta in adapter.items():
            if shapes.setdefault(name, delta.support.shape) != delta.support.shape:
                raise AdapterError(
                    f"the adapters are for different bases: {name!r} has shape {shapes[name]} in "
                    f"one and {delta.support.shape} in another"
                )
    return shapes


class Switching:
    """A `Switch` between adapters on a module."""

    def __init__(self, module: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.module = module
        self.switch = Switch(module)
        self.names = list(adapters)
        for name, adapter in adapters.items():
            self.switch.load(name, adapter, check_base=False)

    def patches(self, number: int) -> Mapping[Target, Patch]:
        """Return what an adapter writes, by weight."""
        with self.switch.using(self.names[number]):
            return self.switch._weights.state.plan

    def there_and_back(self) -> None:
        """Activate the first adapter and deactivate it: what PEFT's merge and unmerge are."""
        self.switch.activate(self.names[0])
        self.switch.deactivate()

    def onwards(self) -> None:
        """Activate the adapter after the one that is active."""
        now = next(iter(self.switch.active), self.names[-1])
        at = self.names.index(now)
        self.switch.activate(self.names[(at + 1) % len(self.names)])


class Limit:
    """The least that switching could do: one word of each touched cache line, read and written.

    Beside it as many bytes are read as the offsets, originals and replacement values have.

    The first two adapters count. Raises MissingDependencyError without compiled kernels.
    """

    def __init__(self, switching: Switching) -> None:
        loaded = native.load()
        if loaded.library is None:
            raise MissingDependencyError(loaded.why)
        self.kernels = loaded.library
        first, second = switching.patches(0), switching.patches(min(1, len(switching.names) - 1))
        self._first = [_walk(target.weight, [patch]) for target, patch in first.items()]
        self._both = [
            _walk(target.weight, [p[target] for p in (first, second) if target in p])
            for target in {**first, **second}
        ]
        longest = max(words for *_, words in self._both)
        self._stream = torch.zeros(longest, dtype=torch.int64)

    def there_and_back(self) -> None:
        """Walk twice over what the first adapter touches."""
        self._run(self._first)
        self._run(self._first)

    def onwards(self) -> None:
        """Walk once over what the first or the second one touches."""
        self._run(self._both)

    def _run(self, walks: list[tuple[Tensor, Tensor, int]]) -> None:
        for weight, lines, words in walks:
            self.kernels.touch(weight.data, lines, self._stream[:words])


def _walk(weight: Tensor, patches: list[Patch]) -> tuple[Tensor, Tensor, int]:
    """Return a weight, its 64-byte lines that patches touch, and the patches' 8-byte words."""
    tensors = [t for patch in patches for t in (patch.offsets, patch.originals, patch.replacement)]
    words = sum(t.numel() * t.element_size() for t in tensors) // 8
    offsets = torch.cat([patch.offsets.long() for patch in patches])
    lines: Tensor = torch.unique(offsets * weight.element_size() // 64)  # type: ignore[no-untyped-call]
    return weight, lines.to(torch.int32), words


def peft_shira(
    linear: nn.Linear, delta: SparseDelta, dtype: torch.dtype = torch.float32
) -> MergeAndUnmerge:
    """Return merging and unmerging of PEFT's own SHiRA, with these entries, on a layer.

    `get_peft_model` makes its values float32 unless told not to.
    """
    from peft.tuners.shira.config import ShiraConfig
    from peft.tuners.shira.model import ShiraModel

    config = ShiraConfig(r=1, target_modules=["layer"])
    config.mask_fn = _first_entries  # type: ignore[assignment]  # its own takes seconds; these are replaced at once
    model = ShiraModel(nn.ModuleDict({"layer": linear}), {"default": config}, "default")
    layer = model.model["layer"]
    layer.shira_weight["default"] = nn.Parameter(delta.values.to(dtype), requires_grad=False)
    layer.shira_indices["default"] = delta.support.coordinates()
    return MergeAndUnmerge(layer)


def shira_in_peft(linear: nn.Linear, delta: SparseDelta) -> MergeAndUnmerge:
    """Return the same with shira's layers, which PEFT calls in the place of its own."""
    from shira.tuner import ShiraConfig, ShiraModel

    config = ShiraConfig(target_modules=["layer"])
    config.mask_fn = lambda base_layer, r, **kwargs: delta.support
    config.density = delta.support.density
    model = ShiraModel(nn.ModuleDict({"layer": linear}), {"default": config}, "default")
    layer = model.model["layer"]
    layer.shira_weight["default"] = nn.Parameter(delta.values.clone(), requires_grad=False)
    return MergeAndUnmerge(layer)


def _first_entries(base_layer: nn.Module, r: int, **kwargs: object) -> Tensor:
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    mask = torch.zeros_like(weight)
    mask.view(-1)[: r * sum(weight.shape)] = 1
    return mask


def peft_lora(linear: nn.Linear, r: int) -> MergeAndUnmerge:
    """Return PEFT's LoRA of a rank on a layer; one run is merge (fuse) and unmerge (unfuse)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=["layer"], init_lora_weights=False)
    model: Any = get_peft_model(nn.ModuleDict({"layer": linear}), config)  # type: ignore[arg-type]
    layer = model.base_model.model["layer"]
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(0.01)
    return MergeAndUnmerge(layer)


class MergeAndUnmerge:
    """Merging and unmerging of a layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self) -> None:
        """Merge and unmerge."""
        with torch.no_grad():
            self.layer.merge()
            self.layer.unmerge()


def linear_around(weight: Tensor) -> nn.Linear:
    """Return a linear layer on this very memory."""
    rows, cols = weight.shape
    linear = nn.Linear(cols, rows, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def in_turns(runs: Runs, repeats: int) -> dict[str, Any]:
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


def digest(module: nn.Module) -> str:
    """Return a hash of every bit of a module's parameters."""
    whole = hashlib.blake2b(digest_size=16)
    for parameter in module.parameters():
        data = parameter.detach().contiguous().view(-1).view(torch.uint8)
        whole.update(data.numpy().data)
    return whole.hexdigest()


def measure(adapters: Mapping[str, Adapter], module: nn.Module, repeats: int) -> dict[str, Any]:
    """Time `Switch` with these adapters on a module, beside the least that it could do.

    Both of them ``there_and_back``, in with the first adapter and out again, and with two or more
    adapters ``onwards``, from one to the next.
    """
    before = digest(module)
    start = time.perf_counter()
    ours = Switching(module, adapters)
    loading = time.perf_counter() - start
    ways = ["there_and_back", "onwards"] if len(ours.names) > 1 else ["there_and_back"]
    limit = None if native.load().library is None else Limit(ours)
    taken: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for way in ways:
        runs: Runs = {"switch": getattr(ours, way)}
        if limit is not None:
            runs["limit"] = getattr(limit, way)
        times = in_turns(runs, repeats)
        taken[way] = times["switch"]
        if limit is not None:
            limits[way] = times["limit"]
    ours.switch.deactivate()
    return {
        "weights": sum(1 for _ in module.parameters()),
        "parameters": sum(p.numel() for p in module.parameters()),
        "entries": {name: adapter.nnz for name, adapter in adapters.items()},
        "kernels": native.load().why,
        "threads": torch.get_num_threads(),
        "load_seconds": loading,
        "switch_seconds": taken,
        "limit_seconds": limits or None,
        "base_equal_bit_for_bit": digest(module) == before,
    }


def compare(adapter: Adapter, dtype: torch.dtype, repeats: int) -> dict[str, Any] | None:
    """Time merging and unmerging one weight in PEFT beside `Switch`, in turns.

    The largest matrix of the adapter is taken; None if there is none, or PEFT is not installed.
    """
    matrices = {name: d for name, d in adapter.items() if len(d.support.shape) == 2 and d.nnz}
    if importlib.util.find_spec("peft") is None or not matrices:
        return None
    name = max(matrices, key=lambda n: matrices[n].support.numel)
    delta, shape = matrices[name], matrices[name].support.shape
    r = max(1, round(delta.nnz / sum(shape)))

    def linear() -> nn.Linear:
        return linear_around(next(module_of({"w": shape}, dtype).parameters()))

    switching = Switching(module_of({"w": shape}, dtype), {"a": Adapter({"w": delta})})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs: Runs = {
            "shira": switching.there_and_back,
            "shira_in_peft": shira_in_peft(linear(), delta),
            "peft_shira": peft_shira(linear(), delta),
            "peft_lora": peft_lora(linear(), r),
        }
        times = in_turns(runs, repeats)
    return {"shape": list(shape), "entries": delta.nnz, "lora_rank": r, "seconds": times}
