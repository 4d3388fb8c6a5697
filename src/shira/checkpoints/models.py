# SPDX-License-Identifier: Apache-2.0
"""The weights of a base model, by an adapter's parameter names, from wherever the model is."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from shira.checkpoints.conversion import Part, as_it_is
from shira.checkpoints.entries import read_blocks, read_entries
from shira.checkpoints.locating import check_untied, locate, match_names
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.errors import AdapterError, MergeError, WrongBaseError, did_you_mean, listed
from shira.store.header import FLOATS
from shira.store.names import base_module_name, full_shape, unwrapped

Base: TypeAlias = "nn.Module | str | os.PathLike[str] | Checkpoint | Mapping[str, Sequence[int]]"
"""A base model, its checkpoint as `open_checkpoint` takes it, or ``{parameter name: shape}``."""

Model: TypeAlias = "str | os.PathLike[str] | Checkpoint | nn.Module | Mapping[str, Tensor]"
"""A checkpoint as `open_checkpoint` takes it, a module, or a state dict."""

PIECE = 2**20
"""Entries of a piece of a tensor: 4 MiB of float32."""


def shapes_of(base: Base, names: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a base model's weights by parameter name.

    Args:
        base: An ``nn.Module`` (wrapped or adapted ones count as the base inside), the path or hub
            name of a safetensors checkpoint, an open one, or the shapes themselves.
        names: An adapter's parameter names, which a checkpoint may hold with another prefix. The
            result has these, or all that there are if it is None; of a module or a mapping always
            all.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If there is no safetensors checkpoint, or it is damaged.
        WrongBaseError: If a checkpoint lacks one of the names.

    Example:
        >>> shapes_of(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        {'0.weight': (2, 3), '0.bias': (2,)}
    """
    if isinstance(base, nn.Module):
        root = unwrapped(base)
        tensors = (
            *root.named_buffers(remove_duplicate=False),
            *root.named_parameters(remove_duplicate=False),
        )
        # PEFT keeps a module that an adapter trains whole as its original_module.
        return {
            base_module_name(name).replace(".original_module.", "."): full_shape(tensor)
            for name, tensor in tensors
        }
    if isinstance(base, Mapping):
        return {name: tuple(int(size) for size in shape) for name, shape in base.items()}
    checkpoint = open_checkpoint(base)
    places = checkpoint.places.by_name if names is None else locate(names, checkpoint)[0]
    return {name: place.shape for name, place in places.items()}


class OnDisk:
    """The floating-point tensors of a checkpoint, no more than a piece of them in memory at a time.

    Attributes:
        label: What to call the model in messages.
        places: The place of each parameter.
        shapes: Shapes of those that a delta can be added to, by name.
        others: Dtypes of those that none can be added to, by name, or why not.
    """

    def __init__(self, checkpoint: Checkpoint, names: Collection[str] = ()) -> None:
        """Open a checkpoint by the names that fit ``names``: the module's, or those in the file."""
        self.checkpoint = checkpoint
        self.label = str(checkpoint.path)
        self.places = checkpoint.places.by_name
        found = not names or match_names(names, self.places) is not None
        if not found and match_names(names, checkpoint.as_stored) is not None:
            self.places = checkpoint.as_stored
        places = self.places.items()
        self.shapes = {n: p.shape for n, p in places if p.dtype in FLOATS and not p.fault}
        self.others = {n: p.fault or p.dtype for n, p in places if n not in self.shapes}

    def check_untied(self, names: Iterable[str]) -> None:
        """Refuse tensors that the model also uses under another name: a change is for both."""
        check_untied((self.places[name] for name in names), self.checkpoint)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return FLOATS[self.places[name].dtype]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Give a tensor as 1-D pieces of `PIECE` entries, in row-major order, on the CPU."""
        return read_blocks(self.places[name], PIECE)

    def entries(self, name: str, flat: Tensor) -> Tensor:
        """Return ``(k,)`` values of a tensor at increasing flat indices, on the CPU."""
        return read_entries(self.places[name], flat.cpu())

    def split(self, name: str, flat: Tensor) -> list[Part]:
        """Return where entries lie in the tensors of the checkpoint."""
        return self.places[name].split(flat)


class InMemory:
    """Tensors that are there already; attributes and methods are those of `OnDisk`."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        floats = FLOATS.values()
        self._tensors = {name: t.detach() for name, t in tensors.items() if t.dtype in floats}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.others = {n: str(t.dtype) for n, t in tensors.items() if t.dtype not in floats}

    def check_untied(self, names: Iterable[str]) -> None:
        """See `OnDisk`."""
        memory = {name: (t.data_ptr(), t.numel()) for name, t in self._tensors.items()}
        for name in names:
            same = [n for n, m in memory.items() if m == memory[name] and m[0] and n != name]
            if same:
                raise MergeError(
                    f"{self.label}: {name!r} is tied: it is the same tensor as "
                    f"{listed(same)}, which would change too. Give each a copy of its own"
                )

    def dtype(self, name: str) -> torch.dtype:
        """See `OnDisk`."""
        return self._tensors[name].dtype

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `OnDisk`."""
        # One that is not contiguous is copied whole, and only while it is looked at.
        whole = self._tensor(name).reshape(-1)
        for low in range(0, whole.numel(), PIECE):
            yield whole[low : low + PIECE].cpu()

    def entries(self, name: str, flat: Tensor) -> Tensor:
        """See `OnDisk`."""
        tensor = self._tensor(name)
        return torch.take(tensor, flat.to(tensor.device).long()).cpu()

    def split(self, name: str, flat: Tensor) -> list[Part]:
        """See `OnDisk`."""
        return as_it_is(name, self.shapes[name]).split(flat)

    def _tensor(self, name: str) -> Tensor:
        if (tensor := self._tensors[name]).is_meta:
            raise AdapterError(
                f"{self.label}: {name!r} has no values: it is on the meta device, or offloaded; "
                "load the model without offloading, or give the path of its checkpoint"
            )
        return tensor


Source: TypeAlias = OnDisk | InMemory


def source_of(model: Model, names: Collection[str] = (), *, all_names: bool = False) -> Source:
    """Open the tensors of a model; ``names`` are those that an adapter of it has.

    ``all_names`` lists a parameter of a module under each of its names, not the first alone.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If there is no safetensors checkpoint, or it is damaged.
        AdapterError: If a value of the mapping is no tensor.
    """
    if isinstance(model, nn.Module):
        named = unwrapped(model).named_parameters(remove_duplicate=not all_names)
        return InMemory({base_module_name(n): p.detach() for n, p in named}, type(model).__name__)
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            if not isinstance(tensor, Tensor):
                raise AdapterError(
                    f"a state dict maps names to tensors, not {name!r} to {type(tensor).__name__}"
                )
        return InMemory(model, "the state dict")
    return OnDisk(open_checkpoint(model), names)


def names_in(source: Source, names: Sequence[str], whose: str) -> dict[str, str]:
    """Return what a model calls each weight; ``whose`` is what changes them, for the message."""
    prefix = match_names(names, source.shapes)
    if prefix is None:
        odd = next((name for name in names if name not in source.shapes), names[0])
        packed = f" (it has one of {source.others[odd]})" if odd in source.others else ""
        raise WrongBaseError(
            f"{source.label}: there is no {odd!r} of floating point{packed}, which the {whose} "
            f"changes; is this its base?{did_you_mean(odd, source.shapes)}"
        )
    return {name: prefix.apply(name) or name for name in names}
