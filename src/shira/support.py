# SPDX-License-Identifier: Apache-2.0
"""`Support`: which entries of a weight an adapter trains.

A support is a weight's shape and the sorted, unique, flat indices of the chosen entries into the
weight as it is stored (row-major order of the stored shape: ``[out, in]`` for ``nn.Linear``,
``[in, out]`` for transformers' ``Conv1D``, ``[out, in, kh, kw]`` for ``nn.Conv2d``,
``[rows, dim]`` for ``nn.Embedding``). It is a plain value: nothing here knows of modules or files.

Everything costs O(k), k the number of entries; nothing of the size of the weight is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shira.errors import SupportError

_INT32_LIMIT = 2**31


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of flat indices into ``numel`` entries: int32 up to 2^31, else int64."""
    return torch.int32 if numel <= _INT32_LIMIT else torch.int64


class Support:
    """A weight's shape and the entries chosen in it.

    Args:
        shape: Shape of the weight as stored.
        indices: 1-D integer tensor ``(k,)`` of flat, row-major indices, strictly increasing,
            each in ``[0, numel)``. Kept as int32 where ``numel`` allows, else as int64.

    Raises:
        SupportError: If the indices are not 1-D integers, or are out of range, unsorted or
            repeated.

    Example:
        >>> support = Support((2, 3), torch.tensor([0, 4]))
        >>> support.coordinates().tolist()  # rows, columns
        [[0, 1], [0, 1]]
        >>> support.nnz, Support.from_mask(support.mask()) == support
        (2, True)
    """

    __slots__ = ("indices", "shape")

    shape: tuple[int, ...]
    indices: Tensor

    def __init__(self, shape: Sequence[int], indices: Tensor) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.indices = _checked(self.shape, indices)

    @classmethod
    def _trusted(cls, shape: Sequence[int], indices: Tensor) -> Support:
        """Return a support of indices that shira itself made sorted, unique and in range."""
        self = cls.__new__(cls)
        self.shape = tuple(shape)
        self.indices = indices.to(index_dtype(math.prod(self.shape)))
        return self

    @classmethod
    def from_unsorted(cls, shape: Sequence[int], indices: Tensor) -> Support:
        """Return the support of unique indices in any order.

        Raises:
            SupportError: If an index is out of range or occurs twice.
        """
        return cls(shape, _signed(indices, "indices").sort().values)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Support:
        """Return the support of a dense 0/1 or boolean mask of the weight's shape.

        Raises:
            SupportError: If an entry is neither 0 nor 1, or the mask is no tensor.
        """
        if not isinstance(mask, Tensor):
            raise SupportError(f"a mask is a tensor, not {type(mask).__name__}")
        chosen = mask if mask.dtype == torch.bool else mask != 0
        if mask.dtype != torch.bool:
            odd = mask.masked_select(chosen & (mask != 1))
            if odd.numel():
                raise SupportError(
                    f"a mask holds only zeros and ones, but {odd.numel()} of its entries are "
                    f"others, the first of them {odd[0].item()}"
                )
        return cls._trusted(mask.shape, chosen.reshape(-1).nonzero().squeeze(1))

    @classmethod
    def from_coordinates(cls, shape: Sequence[int], coordinates: Tensor) -> Support:
        """Return the support of ``(2, k)`` row and column indices, sorted row by row.

        Weights of more than two dimensions count as matrices of ``shape[0]`` rows.

        Raises:
            SupportError: If the coordinates are not ``(2, k)`` integers, or are out of range,
                unsorted or repeated.
        """
        shape = tuple(shape)
        rows, cols = matrix_shape(shape)
        coordinates = _signed(coordinates, "coordinates")
        if coordinates.dim() != 2 or coordinates.shape[0] != 2:
            raise SupportError(
                f"coordinates have shape (2, k), row and column, not {tuple(coordinates.shape)}"
            )
        row, col = coordinates[0].long(), coordinates[1].long()
        for label, index, size in (("row", row, rows), ("column", col, cols)):
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
                bad = index[(index < 0) | (index >= size)][0].item()
                raise SupportError(
                    f"{label} {bad} is outside a weight of shape {shape} ({size} {label}s)"
                )
        return cls(shape, row * cols + col)

    @property
    def nnz(self) -> int:
        """The number of chosen entries, k."""
        return self.indices.numel()

    @property
    def numel(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """nnz / numel, between 0 and 1."""
        return self.nnz / self.numel if self.numel else 0.0

    def coordinates(self) -> Tensor:
        """Return row and column of each entry, int32 ``(2, k)``, as PEFT's ``shira_indices``.

        Raises:
            SupportError: If the weight has more rows or columns than int32 can count.
        """
        rows, cols = matrix_shape(self.shape)
        if max(rows, cols) > _INT32_LIMIT:
            raise SupportError(
                f"int32 coordinates cannot address a weight of shape {self.shape}, "
                f"a matrix of {rows} rows and {cols} columns"
            )
        cols = max(cols, 1)
        return torch.stack((self.indices // cols, self.indices % cols)).to(torch.int32)

    def to(self, device: torch.device | str) -> Support:
        """Return the same support on a device."""
        return Support._trusted(self.shape, self.indices.to(device))

    def mask(self) -> Tensor:
        """Return a dense boolean mask of the weight's shape, at a cost of O(numel)."""
        dense = torch.zeros(self.numel, dtype=torch.bool, device=self.indices.device)
        dense[self.indices.long()] = True
        return dense.view(self.shape)

    def positions_of(self, other: Support) -> Tensor:
        """Return the place in this support of each entry of ``other``.

        Returns:
            int64 ``(other.nnz,)``; -1 where this support lacks the entry.
        """
        _check_same_shape(self, other)
        if not self.nnz:
            return torch.full_like(other.indices, -1, dtype=torch.int64)
        at = torch.searchsorted(self.indices, other.indices).clamp_(max=self.nnz - 1)
        return torch.where(self.indices[at] == other.indices, at, -1)

    def union(self, other: Support) -> Support:
        """Return the entries of either."""
        return align([self, other])[0]

    def intersection(self, other: Support) -> Support:
        """Return the entries of both."""
        shared = self.positions_of(other) >= 0
        return Support._trusted(self.shape, other.indices[shared])

    def overlap(self, other: Support) -> int:
        """Return the number of entries that both have."""
        return int((self.positions_of(other) >= 0).sum())

    def __len__(self) -> int:
        return self.nnz

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Support):
            return NotImplemented
        return self is other or (
            self.shape == other.shape and torch.equal(self.indices, other.indices)
        )

    __hash__ = None  # type: ignore[assignment]  # holds a tensor

    def __repr__(self) -> str:
        return f"Support(shape={self.shape}, nnz={self.nnz}, density={self.density:.4g})"


def align(supports: Sequence[Support]) -> tuple[Support, tuple[Tensor | None, ...]]:
    """Return the union of supports of one shape, and the place in it of each one's entries.

    Places are int64 ``(k_i,)``, or None for one that is the union itself.

    Example:
        >>> a, b = (Support((10,), torch.tensor(at)) for at in ([2, 5, 9], [5, 7]))
        >>> union, places = align([a, b])
        >>> union.indices.tolist(), [place.tolist() for place in places]
        ([2, 5, 7, 9], [[0, 1, 3], [1, 2]])
    """
    first, *others = supports
    for other in others:
        _check_same_shape(first, other)
    if all(other is first or other == first for other in others):
        return first, (None,) * len(supports)
    indices, places = align_indices([support.indices for support in supports])
    return Support._trusted(first.shape, indices), places


def align_indices(parts: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the sorted union of indices that are unique in each part, and each part's places."""
    merged, order = torch.sort(torch.cat(list(parts)), stable=True)
    indices, place = torch.unique_consecutive(merged, return_inverse=True)
    places = torch.empty_like(place)
    places[order] = place
    return indices, tuple(torch.split(places, [part.numel() for part in parts]))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return ``shape`` as that of a matrix: the first dimension, and all others together."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return int(shape[0]), math.prod(shape[1:])


def _signed(indices: Tensor, what: str) -> Tensor:
    """Return integers in a dtype that torch can sort and compare; unsigned ones become int64."""
    if not isinstance(indices, Tensor):
        raise SupportError(f"{what} are an integer tensor, not {type(indices).__name__}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise SupportError(f"{what} are integers, not {indices.dtype}")
    return indices if indices.dtype.is_signed else indices.long()


def _checked(shape: tuple[int, ...], indices: Tensor) -> Tensor:
    if any(size < 0 for size in shape):
        raise SupportError(f"a shape has no negative sizes: {shape}")
    indices = _signed(indices, "indices")
    if indices.dim() != 1:
        raise SupportError(f"indices are one-dimensional, not of shape {tuple(indices.shape)}")
    numel = math.prod(shape)
    if not indices.numel():
        return indices.to(index_dtype(numel))
    if int(indices.min()) < 0:
        raise SupportError(f"index {int(indices.min())} is negative")
    if int(indices.max()) >= numel:
        raise SupportError(
            f"index {int(indices.max())} is outside a weight of shape {shape} ({numel} entries)"
        )
    indices = indices.to(index_dtype(numel))
    bad = (indices[1:] <= indices[:-1]).nonzero()
    if bad.numel():
        at = int(bad[0])
        first, second = int(indices[at]), int(indices[at + 1])
        what = "occurs twice" if first == second else f"comes before the smaller {second}"
        raise SupportError(
            f"indices are sorted and unique, but index {first} (entry {at}) {what}; "
            "Support.from_unsorted sorts them"
        )
    return indices.contiguous()


def _check_same_shape(a: Support, b: Support) -> None:
    if a.shape != b.shape:
        raise SupportError(f"supports of weights of different shape: {a.shape} and {b.shape}")
