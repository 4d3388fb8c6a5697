# SPDX-License-Identifier: Apache-2.0
"""`add_products`: the deltas of several adapters on top of one product, each for its own rows.

A batch whose samples want different adapters is multiplied with the base weight once. What each
adapter adds to its rows takes, on the CPU, one call of a compiled kernel for all (``deltas.c``),
which reads an adapter's gaps and values once for 64 of its tokens: 5 bytes an entry in float32,
about 1.3 ns on one core for a token and 8 ns for 64. Where in memory the entries are is kept for
each set of adapters, and holds as long as their plans do (`shira.ops.plan`). Where the values are
is asked of the tensors at each call: they move when a model is moved, cast or loaded. `DeltaGroups`
keeps all this for the next call with the same groups: between two products of a model none of it
stays in the CPU's caches, and finding it again takes a quarter of the time of adding the deltas. In
later calls groups of one row have their columns at hand, 2 bytes an entry more while they are kept,
which takes 0.9 ns an entry instead of 1.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from shira.errors import AdapterError, SupportError
from shira.ops import native
from shira.ops.delta_product import sparse_product
from shira.ops.gradient import asked_for, triton
from shira.ops.plan import places_of, plan_for
from shira.ops.product import runs_eagerly

_WIDEST_COLUMNS = 2**16
_LARGEST = 2**24  # rows or columns that the kernel's 32-bit offsets reach


def add_products(
    result: Tensor,
    x: Tensor,
    rows: Tensor,
    counts: Sequence[int],
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    shape: tuple[int, int],
    *,
    transposed: bool = False,
) -> Tensor:
    """Add ``x dW^T`` to rows of a product, each group of rows with a dW of its own.

    One call of a kernel for all groups: on the CPU where there is a compiled one
    (``native/deltas.c``), on a GPU if ``SHIRA_BACKEND`` or `use_backend` asks for ``triton``
    (``mixed_batch_triton.py``, not measured on a GPU); else, and where autograd watches,
    `sparse_product` for each. Either way a row's sum is rounded once, to the dtype of the result,
    and rows of no group keep their bits. The compiled kernel's bits of a row do not depend on the
    other rows nor on the number of threads.

    Args:
        result: ``(tokens, out)``, written to.
        x: ``(tokens, in)``.
        rows: int64 ``(sum of counts,)``: the rows of the first group, of the second, and so on,
            none of them twice.
        counts: How many rows each group has.
        deltas: ``(k_i,)`` for each group, scale included; any floating dtype.
        indices: For each, as `sparse_product` takes them.
        shape: Of each dW: ``(out, in)``, or ``(in, out)`` if ``transposed``.
        transposed: dW is stored ``(in, out)``.

    Returns:
        ``result``.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated, or rows out of range or
            named twice. Rows on an accelerator are not checked here: that would wait for it.
        AdapterError: If a delta has another number of values than positions.

    Example:
        >>> x, rows, delta = torch.ones(3, 2), torch.tensor([0, 2]), torch.tensor([5.0])
        >>> at = [torch.tensor([[0], [1]]), torch.tensor([[1], [0]])]
        >>> shira.ops.add_products(torch.zeros(3, 2), x, rows, [1, 1], [delta, -delta], at, (2, 2))
        tensor([[ 5.,  0.],
                [ 0.,  0.],
                [ 0., -5.]])
    """
    groups = DeltaGroups(counts, deltas, indices, shape, transposed=transposed)
    return groups.add(result, x, rows)


class DeltaGroups:
    """Groups of rows and their deltas, found and checked once for many calls of `add`.

    Args and errors: see `add_products`. Later calls may be made by `add_again`.
    """

    def __init__(
        self,
        counts: Sequence[int],
        deltas: Sequence[Tensor],
        indices: Sequence[Tensor],
        shape: tuple[int, int],
        *,
        transposed: bool = False,
    ) -> None:
        places = places_of(indices, shape) if indices else None
        layout = shape, (shape[1], 1)
        sizes = places.sizes if places else [plan_for([i], *layout).nnz for i in indices]
        for delta, k in zip(deltas, sizes, strict=True):
            if delta.numel() != k:  # compiled code would read beyond it
                raise AdapterError(f"{k} positions need as many values, not {delta.numel()}")
        self._counts, self._deltas, self._indices = counts, deltas, indices
        self._shape, self._transposed = shape, transposed
        self._ins, self._outs = shape if transposed else shape[::-1]
        fits = len(counts) == len(deltas) and not (counts and min(counts) < 0)
        self._tokens = sum(counts) if fits else -1
        self._readable = fits and _are_readable(deltas)
        compiled = native.load().library is not None and max(shape) <= _LARGEST
        self._batch: native.Batch | None = None
        if compiled and self._readable and places and deltas[0].is_cpu:
            self._batch = native.Batch(places, deltas, counts)
        # of inference tensors torch does not count the writes
        self.lasting = bool(self._batch) and not any(index.is_inference() for index in indices)
        """True if a compiled kernel may add them again while they are `the_same` and `in_place`."""
        self._again = False
        if self.lasting:
            self._which = [*map(id, deltas)], [*map(id, indices)]
            self._at = _memory_of(deltas), _written(indices)

    def the_same(self, deltas: Sequence[Any], indices: Sequence[Any]) -> bool:
        """Return whether these are the groups' own tensors, and the positions as they were."""
        same = ([*map(id, deltas)], [*map(id, indices)]) == self._which
        return same and bool(_written(indices) == self._at[1])

    def in_place(self) -> bool:
        """Return whether the values are where they were.

        Those that were written to in place are: each product reads them.
        """
        return bool(_memory_of(self._deltas) == self._at[0])

    def add_again(self, result: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """Add as `add` does, to a result for an x of a shape and dtype and rows that it has taken.

        The groups are `lasting`, and autograd and transforms are not at work.
        """
        if not self._again:
            self._again = True
            self._find_columns()
        as_before = result.dtype == x.dtype and result.shape[-1] == self._outs
        if as_before and type(result) is Tensor and result.is_contiguous() and x.is_contiguous():
            return self._add(result, x, rows)
        return self.add(result, x, rows)

    def _find_columns(self) -> None:
        """Have columns for groups of one row, 2 bytes an entry: a third of the time is for them."""
        kernels, before = native.load().library, self._batch
        assert kernels is not None
        assert before is not None
        if self._transposed or self._shape[1] > _WIDEST_COLUMNS:
            return
        gaps, single = before.places.gaps, [i for i, n in enumerate(self._counts) if n == 1]
        with torch.inference_mode(False):
            columns = {i: kernels.columns(gaps[i], self._shape) for i in single}
        self._batch = native.Batch(native.Places(gaps, columns), self._deltas, self._counts)

    def add(self, result: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """Add the groups' products in place, as `add_products` does, and return the result.

        ``result`` and ``x`` may have more dimensions than two, their tokens in all but the last.
        """
        if result.dim() != 2 and not (result.is_contiguous() and x.is_contiguous()):
            flat = result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
            return self.add(*flat, rows).view(result.shape)
        fits = result.shape[:-1] == x.shape[:-1] and len(rows) == self._tokens  # else torch says so
        fits = fits and (result.shape[-1], x.shape[-1]) == (self._outs, self._ins)
        fits = fits and self._can_add(result, x, rows)
        if fits and self._batch is not None:
            return self._add(result, x, rows)
        if result.dim() != 2:
            flat = result.view(-1, result.shape[-1]), x.view(-1, x.shape[-1])
            return self.add(*flat, rows).view(result.shape)
        _check(rows, len(result))
        deltas, indices, counts = self._deltas, self._indices, self._counts
        if fits and asked_for() == "triton" and _triton_can(x, deltas, indices):
            from shira.ops import mixed_batch_triton

            args = result, x, rows, counts, deltas, indices, self._shape, self._transposed
            return mixed_batch_triton.add_products(*args)
        parts = torch.split(rows, [*counts])
        for at, delta, index in zip(parts, deltas, indices, strict=True):
            part = x.index_select(0, at)
            added = sparse_product(part, delta, index, self._shape, transposed=self._transposed)
            # in the wide dtype of `added`, rounded once
            total = (result.index_select(0, at) + added).to(result.dtype)
            result = result.index_copy_(0, at, total)
        return result

    def _add(self, result: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        kernels = native.load().library
        assert kernels is not None
        assert self._batch is not None
        bad = kernels.add_products(result, x, rows, self._batch, self._shape, self._transposed)
        if bad >= 0:
            raise _unusable(int(rows[bad]), math.prod(result.shape[:-1]))
        return result

    def _can_add(self, result: Tensor, x: Tensor, rows: Tensor) -> bool:
        """Return whether a kernel can: operands of its kinds on one device, and nobody watches."""
        if not self._readable or not runs_eagerly(result, x, rows):
            return False
        if result.dtype != x.dtype or result.dtype not in native.KINDS:
            return False
        if rows.dtype != torch.int64 or not rows.is_contiguous() or result.stride(-1) != 1:
            return False
        if self._batch is not None:
            if not (result.is_cpu and x.is_cpu and rows.is_cpu):
                return False
        elif len({t.device for t in (result, x, rows, *self._deltas[:1])}) > 1:
            return False
        if not torch.is_grad_enabled():
            return True
        return not any(t.requires_grad for t in (result, x, *self._deltas))


_dtype_of, _version_of = attrgetter("dtype"), attrgetter("_version")


def _memory_of(deltas: Sequence[Tensor]) -> Any:
    """Return all that a kernel is told of values."""
    return (
        [*map(type, deltas)],
        [*map(Tensor.data_ptr, deltas)],
        [*map(_dtype_of, deltas)],
        [*map(Tensor.numel, deltas)],
        [*map(Tensor.is_contiguous, deltas)],
    )


def _written(indices: Sequence[Tensor]) -> Any:
    """Return what differs once positions were moved or written to."""
    return [*map(Tensor.data_ptr, indices)], [*map(_version_of, indices)]


def _are_readable(deltas: Sequence[Tensor]) -> bool:
    """Return whether a kernel can read these: in memory of one device, in dtypes of its kinds."""
    if not runs_eagerly(*deltas):
        return False
    for delta in deltas:
        if delta.device != deltas[0].device or delta.dtype not in native.KINDS:
            return False
        # memory that was let go, as FSDP does, has no address
        if not delta.is_contiguous() or not (delta.data_ptr() or not delta.numel()):
            return False
    return True


def _triton_can(x: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]) -> bool:
    """Return whether the Triton kernel can, of what `_can_add` takes; it reads by address."""
    alike = len({delta.dtype for delta in deltas}) == 1
    here = all(index.device == x.device for index in indices)
    return alike and here and triton.available(x.device, x.dtype)[0]


def _check(rows: Tensor, tokens: int) -> None:
    """Refuse rows as the compiled kernel does, if they are on the CPU and there."""
    if not rows.is_cpu or not runs_eagerly(rows):
        return
    outside = rows[(rows < 0) | (rows >= tokens)]
    named, times = torch.unique(rows, return_counts=True)
    for bad in (*outside[:1], *named[times > 1][:1]):
        raise _unusable(int(bad), tokens)


def _unusable(row: int, tokens: int) -> SupportError:
    why = "is named twice" if 0 <= row < tokens else f"is out of range: the result has {tokens}"
    return SupportError(f"row {row} {why}")
