# SPDX-License-Identifier: Apache-2.0
"""The positions that adapters train: kept in each layer, and the same in every process.

`IndexDict` holds those of a layer under PEFT's name ``shira_indices``, as persistent buffers, so
that they move, save and load with the layer. Seen from outside, in state dicts too, they are PEFT's
int32 ``(2, k)``, whatever they are cast to: some versions of PEFT cast every entry of a buffer
dictionary to the weight's dtype, in which large indices do not fit. From a layer's first forward on
they are kept `shira.ops.gaps`, a byte each, where that can be (not before: who loads a file into
a new model, transformers for one, compares shapes with the buffers).

Data parallelism averages gradients entry by entry. If two processes chose different entries, the
first gradient of one is averaged with that of another weight of the other; nothing fails and the
training is silently wrong. So each process hashes its positions, and they are compared before the
first training step (`check_ranks`).
"""

from __future__ import annotations

import copy
import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from shira.errors import RankMismatchError, SupportError
from shira.ops.gaps import pack, support_of, unpack
from shira.ops.plain import transforming
from shira.support import Support

SWITCH = "SHIRA_CHECK_RANKS"
"""Environment variable; ``0`` turns the automatic check off."""

Digests = dict[tuple[str, str], frozenset[str]]
"""``{(adapter, parameter): hashes}``; several where a process holds several such models."""

_IGNORED = "_ddp_params_and_buffers_to_ignore"
new_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that have got an adapter; they are checked at the first training forward."""


def digest_of(support: Support) -> str:
    """Return a hash of positions and of the shape that they are in."""
    hashed = hashlib.blake2b(support.indices.cpu().contiguous().numpy().tobytes(), digest_size=8)
    hashed.update(repr(support.shape).encode())
    return hashed.hexdigest()


class IndexDict(BufferDict):
    """``{adapter name: int32 (2, k)}``: row and column of each trained entry, sorted."""

    _buffers: dict[str, Any]

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(persistent=True)
        self._shape = tuple(shape)
        self._left_out = False
        self.is_held = False
        """True if positions stay int32: one shape for as many entries, as compiled code wants."""

    def hold(self) -> None:
        """Keep all positions as int32 ``(2, k)`` from now on."""
        self._buffers.update(self.items())
        self.is_held = True

    def __setitem__(self, adapter_name: str, indices: Tensor) -> None:
        if indices.is_floating_point() and not torch.equal(indices, indices.float().round()):
            raise SupportError(f"indices of adapter {adapter_name!r} are not whole numbers")
        if not (indices.is_meta and adapter_name in self):  # never to the meta device: see _apply
            super().__setitem__(adapter_name, indices.to(torch.int32))

    def __getitem__(self, adapter_name: str) -> Tensor:
        return unpack(super().__getitem__(adapter_name), self._shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> IndexDict:
        # Kept alike in both, for what goes on to copy buffers from one to the other (torch's
        # AveragedModel): the first forward of the one would pack its own alone.
        for name in self._buffers:
            self.kept(name)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def kept(self, adapter_name: str) -> Tensor:
        """Return the positions as they are kept: the same tensor at each call, for ops."""
        indices: Tensor = self._buffers[adapter_name]
        unpacked = indices.dtype != torch.uint8 and not self.is_held
        if unpacked and not torch.compiler.is_compiling() and not transforming():
            indices = self._buffers[adapter_name] = pack(indices, self._shape)
        return indices

    def all_kept(self, adapter_names: Sequence[str]) -> list[Tensor]:
        """Return what `kept` does, of several adapters."""
        buffers = self._buffers
        return [
            indices if (indices := buffers[name]).dtype == torch.uint8 else self.kept(name)
            for name in adapter_names
        ]

    def support(self, adapter_name: str) -> Support:
        """Return the positions as a support, checked."""
        return support_of(self._buffers[adapter_name], self._shape)

    items: Any = Mapping.items  # by `__getitem__`
    values: Any = Mapping.values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IndexDict:
        # Never to the meta device: who moves a model there, to load or to shard it (Accelerate's
        # cpu_ram_efficient_loading), means to fill its parameters afterwards, not its positions.
        real = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, indices in self._buffers.items():
            if indices.is_meta:
                self._buffers[name] = real[name]
            elif not indices.is_cpu:
                self._buffers[name] = unpack(indices, self._shape)
        return self

    def leave_out(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the positions out of a state dict that is about to be filled and loaded back."""
        for name in self._buffers:
            state_dict.pop(prefix + name, None)
        self._left_out = True

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name in self:
            destination[prefix + name] = self[name]

    def _load_from_state_dict(self, *args: Any) -> None:
        missing_keys: list[str] = args[4]
        known = len(missing_keys)
        before = dict(self._buffers)
        self._buffers.update(self.items())  # what is loaded is copied into them
        try:
            super()._load_from_state_dict(*args)
            # the tensors as they were if they hold the same: plans go by them
            for name, indices in self._buffers.items():
                old, new = before[name], indices.to(torch.int32)
                if new.device != old.device or not torch.equal(new, unpack(old, self._shape)):
                    before[name] = new
        finally:
            self._buffers.update(before)
        if self._left_out:
            del missing_keys[known:]
        self._left_out = False


def check_ranks(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare the positions of every adapter of a model between processes; a collective call.

    It is made by itself at the first training forward under an initialized
    ``torch.distributed``. Call it where that cannot be: when only some ranks train, with their
    group and the environment variable ``SHIRA_CHECK_RANKS=0``.

    Args:
        model: A model with SHiRA layers, wrapped or not.
        group: The processes to compare; None means all.

    Raises:
        RankMismatchError: On every rank, if two ranks train different positions, or an adapter was
            added to a model that FSDP2 had sharded before.
    """
    layers = _layers_of(model)
    for layer in layers:
        _refuse_beside_shards(layer)
    _check(layers, group)


def check_new_models(layer: Any = None) -> None:
    """Check the new models; a collective call.

    A copy of a model is not noted, so a layer of it is checked when its forward is about to run.
    """
    if not _several_ranks() or os.environ.get(SWITCH) == "0":
        return
    layers = [found for model in new_models for found in _layers_of(model)]
    if layer is not None and not any(found is layer for found in layers):
        layers.append(layer)
    for each in layers if layer is None else [layer]:
        _refuse_beside_shards(each)
    _check(layers, None)
    new_models.clear()


# Called by torch.compile while it traces, with no argument: so it neither breaks the graph nor adds
# a guard, and compiled blocks of equal structure go on sharing one graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def check_while_compiling() -> bool:
    """Check the new models while a training forward is being compiled."""
    if new_models and torch.is_grad_enabled():
        check_new_models()
    return True


def digests_of(layers: Iterable[Any]) -> Digests:
    """Return hashes of the positions of all adapters of some layers. O(k)."""
    digests: Digests = {}
    for layer in layers:
        for adapter in layer.shira_indices:
            key = (adapter, layer.weight_name)
            digests[key] = digests.get(key, frozenset()) | {digest_of(layer.support(adapter))}
    return digests


def compare(digests: Digests, group: dist.ProcessGroup | None) -> None:
    """Compare hashes between the processes of a group: 8 bytes from each, more if they differ."""
    ordered = sorted((key, sorted(hashes)) for key, hashes in digests.items())
    total = hashlib.blake2b(repr(ordered).encode(), digest_size=8).hexdigest()
    if len(set(_gather(total, group))) > 1:
        raise_if_different(_gather(digests, group))


def raise_if_different(by_rank: Sequence[Digests]) -> None:
    """Raise if a parameter that two ranks have, as all but stages of a pipeline do, differs."""
    different: dict[tuple[str, str], tuple[int, int]] = {}
    first: dict[tuple[str, str], int] = {}
    for rank, digests in enumerate(by_rank):
        for key, hashes in digests.items():
            other = by_rank[first.setdefault(key, rank)][key]
            # one of them may hold a further model with parameters of this name
            if not (hashes <= other or other <= hashes):
                different.setdefault(key, (first[key], rank))
    for (adapter, parameter), (one, two) in sorted(different.items()):
        raise RankMismatchError(
            f"adapter {adapter!r}, parameter {parameter!r}: ranks {one} and {two} train different "
            f"positions ({len(different)} of {len(first)} parameters differ). Averaging their "
            "gradients would be wrong. Give the config a random_seed, or make masks from data on "
            "one rank and send them to the others; masks that look at weights need equal weights "
            "on every rank"
        )


def ignore_in_ddp(model: nn.Module) -> None:
    """Keep DDP from sending the positions from rank 0 to all others at every forward.

    They never change, and `check_new_models` sees to it that they are equal. Names that others put
    into the model's list stay; without SHiRA layers the list is as it was before.
    """
    if names := ignored_by_ddp(model):
        setattr(model, _IGNORED, names)
    elif _IGNORED in model.__dict__:
        delattr(model, _IGNORED)


def ignored_by_ddp(model: nn.Module) -> list[str]:
    """Return what others have DDP ignore in a model, and the positions of its adapters."""
    others = [name for name in model.__dict__.get(_IGNORED, ()) if ".shira_indices." not in name]
    positions = [name for name, _ in model.named_buffers() if ".shira_indices." in f".{name}"]
    return [*others, *positions]


def _check(layers: Sequence[Any], group: dist.ProcessGroup | None) -> None:
    compare(digests_of(layers), group)
    for layer in layers:
        layer._positions_unchecked = False


def _refuse_beside_shards(layer: Any) -> None:
    """Refuse to train values that FSDP2 does not know of: nobody would average their gradients."""
    for adapter, values in layer._beside_shards.items():
        kept = layer.shira_weight.get(adapter, None)
        if kept is values and values.requires_grad:  # FSDP2 would have put a tensor of its own
            raise RankMismatchError(
                f"adapter {adapter!r}, parameter {layer.weight_name!r}: the adapter was added to a "
                "model that fully_shard had sharded before, so each rank would train values of its "
                "own, and nobody would average their gradients. Add the adapter first, then shard "
                "the model"
            )


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group)
    return everyone


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m._modules.get("shira_indices"), IndexDict)]
