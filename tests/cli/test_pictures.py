# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.adapter import Adapter
from shira.cli.pictures import CELLS, heat_map, histogram, mean_maps
from shira.delta import SparseDelta
from shira.masks import random_support
from shira.support import Support


def dense_heat(support: Support) -> np.ndarray:
    """The same from the dense mask, part by part."""
    mask = support.mask().reshape(support.shape[0], -1).numpy()
    rows, cols = mask.shape
    down, across = min(rows, CELLS), min(cols, CELLS)
    part_row, part_col = np.arange(rows) * down // rows, np.arange(cols) * across // cols
    return np.array(
        [
            [mask[np.ix_(part_row == i, part_col == j)].mean() for j in range(across)]
            for i in range(down)
        ]
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 210), st.integers(1, 210), st.integers(0, 2**31))
def test_equals_the_dense_heat_map(rows: int, cols: int, seed: int) -> None:
    k = rows * cols * (seed % 100) // 100
    support = random_support((rows, cols), k, seed=seed)
    made = heat_map(support)
    assert made.shape == (min(rows, CELLS), min(cols, CELLS))
    np.testing.assert_allclose(made, dense_heat(support))


def test_no_entries_and_no_weight() -> None:
    assert not heat_map(Support((4, 5), torch.empty(0, dtype=torch.int32))).any()
    assert heat_map(Support((0, 5), torch.empty(0, dtype=torch.int32))).shape == (0, 0)
    assert heat_map(Support((2, 3, 2), torch.tensor([0, 11]))).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_cost_follows_the_entries() -> None:
    """A weight of 2^60 entries."""
    support = Support((2**30, 2**30), torch.tensor([0, 2**60 - 1]))
    made = heat_map(support)
    assert made.shape == (CELLS, CELLS)
    assert np.count_nonzero(made) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histogram_counts_each_value_once(dtype: torch.dtype) -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0]).to(dtype)
    counts, edges = histogram([values, values], bins=5)
    assert counts.tolist() == [2, 2, 4, 2, 2]
    assert edges.tolist() == pytest.approx([-2.0, -1.2, -0.4, 0.4, 1.2, 2.0])
    assert histogram([])[0].sum() == 0


def test_like_weights_share_a_map() -> None:
    first = Support((2, 2), torch.tensor([0]))
    second = Support((2, 2), torch.tensor([0, 3]))
    adapter = Adapter(
        {
            "h.0.a.weight": SparseDelta(first, torch.ones(1)),
            "h.1.a.weight": SparseDelta(second, torch.ones(2)),
            "b.weight": SparseDelta(first, torch.ones(1)),
        }
    )
    maps = {
        title.partition("\n")[0]: made for title, made in mean_maps(adapter, each=False).items()
    }
    assert {title: made.tolist() for title, made in maps.items()} == {
        "h.*.a.weight": [[1.0, 0.0], [0.0, 0.5]],
        "b.weight": [[1.0, 0.0], [0.0, 0.0]],
    }
    assert len(mean_maps(adapter, each=True)) == 3
