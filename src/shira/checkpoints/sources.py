# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model, one after the other, from wherever it is: on disk, a module, a mapping.

What extraction and patches need of a model: names, shapes, dtypes, a tensor in flat pieces, and
single entries of it. From disk no more than a piece is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from shira.checkpoints.entries import read_entries, read_span
from shira.checkpoints.naming import check_untied
from shira.checkpoints.opening import FLOATS, Checkpoint, open_checkpoint
from shira.errors import AdapterError, MergeError, listed
from shira.store.names import base_module_name, unwrapped

BLOCK = 2**20
"""Entries of a piece: 4 MiB of float32."""

Model: TypeAlias = "str | os.PathLike[str] | Checkpoint | nn.Module | Mapping[str, Tensor]"
"""A checkpoint as `open_checkpoint` takes it, a module, or a state dict."""


class Source(Protocol):
    """Floating-point tensors by name."""

    @property
    def label(self) -> str:
        """What to call the model in messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors that a delta can be added to, by name."""
        ...

    @property
    def others(self) -> Mapping[str, str]:
        """Dtypes of the tensors that none can be added to, by name."""
        ...

    def check_untied(self, names: Iterable[str]) -> None:
        """Refuse tensors that the model also uses under another name: a change is for both.

        Raises:
            MergeError: If there is one.
        """
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor as 1-D pieces of `BLOCK` entries, in row-major order, on the CPU."""
        ...

    def entries(self, name: str, flat: Tensor) -> Tensor:
        """``(k,)`` values of a tensor at increasing flat indices, on the CPU."""
        ...


def source_of(model: Model, *, shared: bool = False) -> Source:
    """The tensors of a model.

    Args:
        model: Where they are.
        shared: List a parameter of a module under each of its names, not under the first alone.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If there is no safetensors checkpoint, or it is damaged.
        AdapterError: If a value of the mapping is no tensor.
    """
    if isinstance(model, nn.Module):
        named = unwrapped(model).named_parameters(remove_duplicate=not shared)
        return InMemory({base_module_name(n): p.detach() for n, p in named}, type(model).__name__)
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            if not isinstance(tensor, Tensor):
                raise AdapterError(
                    f"a state dict maps names to tensors, not {name!r} to {type(tensor).__name__}"
                )
        return InMemory(model, "the state dict")
    return OnDisk(open_checkpoint(model))


class InMemory:
    """Tensors that are there already."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        floats = FLOATS.values()
        self._tensors = {name: t.detach() for name, t in tensors.items() if t.dtype in floats}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.others = {n: str(t.dtype) for n, t in tensors.items() if t.dtype not in floats}

    def check_untied(self, names: Iterable[str]) -> None:
        """See `Source`."""
        memory = {name: (t.data_ptr(), t.numel()) for name, t in self._tensors.items()}
        for name in names:
            same = [n for n, m in memory.items() if m == memory[name] and m[0] and n != name]
            if same:
                raise MergeError(
                    f"{self.label}: {name!r} is tied: it is the same tensor as "
                    f"{listed(same)}, which would change too. Give each a copy of its own"
                )

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        return self._tensors[name].dtype

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `Source`."""
        # One that is not contiguous is copied whole, and only while it is looked at.
        whole = self._tensors[name].reshape(-1)
        for low in range(0, whole.numel(), BLOCK):
            yield whole[low : low + BLOCK].cpu()

    def entries(self, name: str, flat: Tensor) -> Tensor:
        """See `Source`."""
        tensor = self._tensors[name]
        where = flat.to(tensor.device)
        if tensor.is_contiguous():
            return tensor.view(-1).index_select(0, where).cpu()
        return torch.take(tensor, where.long()).cpu()


class OnDisk:
    """Tensors of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.label = str(checkpoint.path)
        tensors = checkpoint.tensors.items()
        self.shapes = {name: t.shape for name, t in tensors if t.dtype in FLOATS}
        self.others = {name: t.dtype for name, t in tensors if t.dtype not in FLOATS}

    def check_untied(self, names: Iterable[str]) -> None:
        """See `Source`."""
        check_untied((self.checkpoint.tensors[name] for name in names), self.checkpoint)

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        return FLOATS[self.checkpoint.tensors[name].dtype]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `Source`."""
        stored = self.checkpoint.tensors[name]
        count = (stored.end - stored.start) // FLOATS[stored.dtype].itemsize
        with open(stored.file, "rb", buffering=0) as file:
            for first in range(0, count, BLOCK):
                yield read_span(file, stored, first, min(BLOCK, count - first))

    def entries(self, name: str, flat: Tensor) -> Tensor:
        """See `Source`."""
        stored = self.checkpoint.tensors[name]
        with open(stored.file, "rb", buffering=0) as file:
            return read_entries(file, stored, flat)
