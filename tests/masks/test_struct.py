# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import MaskError
from shira.masks import struct, struct_support
from shira.support import matrix_shape

shapes = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)


def slow_struct(shape, k, axis, offset):
    """The diagonal, then whole lines one after another, tried with ever more lines."""
    rows, cols = matrix_shape(shape)
    diagonal = [(i, i) for i in range(min(rows, cols))]
    if k <= len(diagonal):
        return {r * cols + c for r, c in diagonal[:k]}
    count, length = (rows, cols) if axis == "row" else (cols, rows)
    for needed in range(1, count + 1):
        cells = list(diagonal)
        for j in range(needed):
            line = (offset + math.floor(Fraction(j * count, needed))) % count
            for p in range(length):
                cell = (line, p) if axis == "row" else (p, line)
                if cell not in cells and len(cells) < k:
                    cells.append(cell)
        if len(cells) == k:
            return {r * cols + c for r, c in cells}
    raise AssertionError("no number of lines holds the budget")


@settings(deadline=None)
@given(shapes, st.floats(0, 1), st.sampled_from(["row", "column"]), st.integers(-5, 30))
def test_equals_the_slow_definition(shape, share, axis, offset):
    k = round(share * math.prod(shape))
    support = struct_support(shape, k, axis=axis, offset=offset)
    entries = support.indices.tolist()
    assert len(entries) == k
    assert entries == sorted(slow_struct(shape, k, axis, offset))
    assert support.shape == shape
    assert support == struct_support(shape, k, axis=axis, offset=offset)


def picture(support):
    return ["".join(".1"[int(x)] for x in row) for row in support.mask()]


def test_the_pictures_of_the_documentation():
    rows = picture(struct_support((6, 9), 19))
    columns = picture(struct_support((6, 9), 20, axis="column"))
    drawn = [line for line in struct.__doc__.splitlines() if line.startswith("    ")][1:]
    drawn = ["".join(c for c in line if c in "1.") for line in drawn]
    assert drawn == [row + column for row, column in zip(rows, columns, strict=True)]


def test_an_offset_shifts_the_lines_round_the_end():
    assert picture(struct_support((6, 6), 6 + 5 * 2, offset=4)) == [
        "1.....",
        "111111",
        "..1...",
        "...1..",
        "111111",
        ".....1",
    ]


@pytest.mark.parametrize("axis", ["row", "column"])
def test_the_usual_budget_gives_a_matrix_of_high_rank(axis):
    support = struct_support((48, 64), 8 * (48 + 64), axis=axis)
    values = torch.randn(support.nnz, generator=torch.Generator().manual_seed(0))
    dense = torch.zeros(48 * 64).index_put_((support.indices.long(),), values).view(48, 64)
    assert torch.linalg.matrix_rank(dense) == 48
    full = support.mask().all(dim=1 if axis == "row" else 0).nonzero().view(-1)
    assert len(full) >= 12
    assert full.diff().max() - full.diff().min() <= 1  # evenly spread


def test_the_ends_of_the_budget():
    assert struct_support((3, 4), 0).nnz == 0
    assert struct_support((0, 4), 0).nnz == 0
    assert struct_support((3, 4), 2).indices.tolist() == [0, 5]
    assert struct_support((3, 4), 12).nnz == 12
    assert struct_support((), 1).nnz == 1


def test_a_huge_weight_costs_its_budget_alone():
    support = struct_support((2**20, 2**20), 2**20 + 10)
    assert support.nnz == 2**20 + 10
    assert support.indices.dtype == torch.int64
    assert support.indices[-1] == 2**40 - 1


def test_mistakes():
    with pytest.raises(MaskError, match="does not fit"):
        struct_support((3, 4), 13)
    with pytest.raises(MaskError, match=r"'rows'\. Did you mean 'row'"):
        struct_support((3, 4), 5, axis="rows")
