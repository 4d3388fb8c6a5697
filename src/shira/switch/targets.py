# SPDX-License-Identifier: Apache-2.0
"""An adapter on a module: where its parameters are, whether they can be written to, its entries.

Names are the base model's own: PEFT's and other wrappers around or inside the module are seen
through. Tied weights are one memory under several names; a name stands for the memory, and the
first name found is what it is called here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.base import Verdict, accept, judge
from shira.delta import SparseDelta, same_tensor
from shira.errors import AdapterError, MergeError, TargetError, WrongBaseError, did_you_mean
from shira.ops.memory import MemoryMap, overlaps_itself
from shira.ops.patch import Patch
from shira.store.names import base_module_name, unwrapped
from shira.switch.weights import Entry, Layout, layout_of, make_entry

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter or buffer of a module, held by its place: what is put there later is found."""

    name: str
    owner: nn.Module
    attribute: str

    @property
    def weight(self) -> Tensor:
        """The tensor that is there now."""
        weight: Tensor | None = self.owner._parameters.get(self.attribute)
        if weight is None:
            weight = self.owner._buffers.get(self.attribute)
        if weight is None:
            raise AdapterError(
                f"the model has no parameter {self.name!r} any more; Switch was made for one that "
                "has: make a new Switch"
            )
        return weight


class Targets:
    """All parameters and buffers of a module without its wrappers, as they are at this moment."""

    def __init__(self, module: nn.Module) -> None:
        self._by_name: dict[str, Target] = {}
        self._buffers: dict[str, Target] = {}
        self._blocks: dict[int, list[_Block]] = {}  # by the address of their storage
        modules = [*unwrapped(module).named_modules(remove_duplicate=False)]
        for found, kind in ((self._by_name, "_parameters"), (self._buffers, "_buffers")):
            for path, owner in modules:
                for attribute, tensor in getattr(owner, kind).items():
                    if tensor is None:
                        continue
                    name = base_module_name(f"{path}.{attribute}" if path else attribute)
                    target = found.setdefault(name, Target(name, owner, attribute))
                    if is_plain(tensor) and not tensor.is_meta:
                        at = tensor.untyped_storage().data_ptr()
                        self._blocks.setdefault(at, []).append(_block(target, tensor))

    def find(self, name: str, *, buffers: bool = False) -> Target:
        """Return the parameter, or buffer, that the base model calls so; else an `AdapterError`."""
        for known in (self._by_name, self._buffers if buffers else {}):
            if name in known:
                return known[name]
        module, _, attribute = name.rpartition(".")
        if f"{module}.original_module.{attribute}" in self._by_name:
            raise AdapterError(
                f"{name!r} is in a module of which PEFT keeps copies that adapters train whole "
                "(modules_to_save); make the Switch for the base model without PEFT"
            )
        raise AdapterError(
            f"the model has no parameter {name!r}.{did_you_mean(name, self._by_name)}"
        )

    def sharing(self, target: Target) -> tuple[list[str], list[Target]]:
        """Find what shares memory with a weight (tied weights, views).

        Names whose memory overlaps the weight's, but for its own; and all that is exactly this
        weight, itself included: parameters first, then buffers, each in the model's order.
        """
        own = _block(target, target.weight)
        blocks = self._blocks.get(target.weight.untyped_storage().data_ptr(), [])
        overlapping = {b.target.name for b in blocks if b.start < own.end and own.start < b.end}
        tied = [block.target for block in blocks if block[1:] == own[1:]]
        return sorted(overlapping - {target.name}), tied


class _Block(NamedTuple):
    """The memory of a tensor: from its first byte to after its last."""

    target: Target
    start: int
    end: int
    layout: Layout


def _block(target: Target, tensor: Tensor) -> _Block:
    layout, start = layout_of(tensor), tensor.data_ptr()
    span = sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))
    extent = (1 + span) * tensor.element_size() if tensor.numel() else 0
    return _Block(target, start, start + extent, layout)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is torch's own dense kind: not packed, sharded or yet to come."""
    return (
        not torch.nn.parameter.is_lazy(tensor)
        and tensor.layout == torch.strided
        and type(tensor.data) is Tensor
    )


def check_writable(
    target: Target, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    """Refuse a weight that deltas, or a whole tensor of ``dtype`` in its place, cannot go into."""
    weight = target.weight
    counts = dtype is not None and not dtype.is_floating_point and weight.dtype == dtype
    if not is_plain(weight) or (weight.dtype not in _DTYPES and not counts):
        raise TargetError(
            f"{target.name!r} is no plain floating point weight ({type(weight.data).__name__}, "
            f"{weight.dtype}, {weight.layout}): entries of quantized, sharded, sparse or lazy "
            "weights cannot be overwritten one by one"
        )
    if tuple(weight.shape) != shape:
        raise WrongBaseError(
            f"the adapter's {target.name!r} is for a weight of shape {shape}, but the model's has "
            f"{tuple(weight.shape)}"
        )
    if dtype is not None and dtype.is_floating_point != weight.is_floating_point():
        raise WrongBaseError(f"{target.name!r} is {weight.dtype}, and the adapter's {dtype}")
    if weight.is_meta:
        raise TargetError(
            f"{target.name!r} is on the meta device and has no values yet; load the model first"
        )
    if overlaps_itself(weight):
        raise TargetError(
            f"entries of {target.name!r} share memory (an expanded tensor); put a copy in its place"
        )


def give_private_memory(targets: Iterable[Target], module: nn.Module) -> None:
    """Give weights that are read-only, mapped from a file or shared with processes their own copy.

    Writing to them would end the process, change the file, or show others the adapter. This is the
    one time that a weight's memory moves.
    """
    memory_map = MemoryMap()
    moved = [target for target in targets if not memory_map.is_private(target.weight.data)]
    if not moved:
        return
    index = Targets(module)
    for target in moved:
        weight = target.weight.detach()
        # of the same strides, for what was made for the weight as it was
        own = torch.empty_strided(
            weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
        ).copy_(weight)
        for same in index.sharing(target)[1]:
            same.weight.data = own
    warnings.warn(
        f"{len(moved)} weights, {moved[0].name!r} first, were mapped from a file or shared with "
        "other processes, where an adapter must not be written; they have memory of their own now",
        stacklevel=4,
    )


def refuse_merged(layers: Iterable[nn.Module]) -> None:
    """Refuse layers of PEFT's that have adapters merged into their weights (`MergeError`)."""
    for layer in layers:
        if merged := getattr(layer, "merged_adapters", None):
            raise MergeError(
                f"the model has merged adapters ({', '.join(map(str, merged))}), so its weights "
                "are not the base's; call unmerge_adapter() first"
            )


def resolve(
    name: str, adapter: Adapter, module: nn.Module, known: Mapping[str, Target], allow_tied: bool
) -> dict[Target, str]:
    """Find the module's weights that an adapter's parameters are for; each can be written to.

    Those that adapters are loaded for already are ``known``, by name.
    """
    index, names = Targets(module), dict[Target, str]()
    shapes = {parameter: delta.support.shape for parameter, delta in adapter.items()}
    shapes |= {parameter: tuple(tensor.shape) for parameter, tensor in adapter.tensors.items()}
    for parameter, shape in shapes.items():
        whole = adapter.tensors.get(parameter)
        try:
            target = index.find(parameter, buffers=whole is not None)
            check_writable(target, shape, None if whole is None else whole.dtype)
            same = _same_change(adapter, parameter, index.sharing(target)[0])
            target = _of_memory(target, index, same, allow_tied)
        except (AdapterError, TargetError) as error:
            raise type(error)(f"adapter {name!r}: {error}") from None
        found, target = target, known.get(target.name, target)
        if found.weight is not target.weight:
            raise AdapterError(
                f"adapter {name!r}: {parameter!r} is in another module than when adapters were "
                "loaded for it before; make a new Switch"
            )
        if target in names and names[target] not in same:
            raise AdapterError(
                f"adapter {name!r} has two changes for one weight, which is tied: {parameter!r} "
                f"and {names[target]!r} are the same memory; remove one of the two"
            )
        names.setdefault(target, parameter)
    return names


def _same_change(adapter: Adapter, parameter: str, others: Iterable[str]) -> set[str]:
    """Return those of some names, and the parameter's own, that get the very same change."""
    if parameter in adapter:
        change = adapter[parameter]
        same = [name for name in others if name in adapter and adapter[name] == change]
    else:
        whole, tensors = adapter.tensors[parameter], adapter.tensors
        same = [name for name in others if name in tensors and same_tensor(tensors[name], whole)]
    return {parameter, *same}


def _of_memory(target: Target, index: Targets, same: Collection[str], allow_tied: bool) -> Target:
    """Return the target that stands for a weight's memory: its own, or of tied ones the first.

    Names in ``same`` get the same change, so that it is no matter that they share memory.
    """
    sharers, tied = index.sharing(target)
    if not sharers:
        return target
    if not allow_tied and not set(sharers) <= set(same):
        raise TargetError(
            f"{target.name!r} shares its memory with {', '.join(map(repr, sharers))} (tied "
            "weights), which the adapter would change too. To allow it: "
            "load(..., allow_tied=True)"
        )
    apart = sorted({*sharers} - {other.name for other in tied})
    if apart:
        raise TargetError(
            f"{target.name!r} shares a part of its memory with {', '.join(map(repr, apart))}, of "
            "another shape or layout; put a copy in the place of one of them"
        )
    return tied[0]


@dataclass
class Prepared:
    """An adapter whose parameters have been found in a module."""

    name: str
    adapter: Adapter
    names: Mapping[Target, str]
    """The adapter's name of each weight."""
    check_base: bool
    """True if the base's fingerprint must agree."""
    entries: dict[Target, Entry] = field(default_factory=dict)
    """By weight, ready to be written; one that is missing is made by `complete`."""

    def complete(self, active: Mapping[Target, Patch]) -> None:
        """Check the base, and make entries that are missing; ``active`` is in the weights now."""
        made: dict[Target, Entry] = {}
        verdicts: dict[str, Verdict] = {}
        metadata, where = self.adapter.metadata, f"adapter {self.name!r}"
        for target, name in self.names.items():
            if target in self.entries:
                continue
            change = self.adapter[name] if name in self.adapter else self.adapter.tensors[name]
            try:
                made[target], base = make_entry(change, target.weight, active.get(target))
            except AdapterError as error:
                raise AdapterError(f"{where}, parameter {target.name!r}: {error}") from None
            if self.check_base and isinstance(change, SparseDelta):
                verdicts[name] = judge(metadata, name, change.values, base)
        accept(metadata, verdicts, where, "load(..., check_base=False)")
        self.entries.update(made)
