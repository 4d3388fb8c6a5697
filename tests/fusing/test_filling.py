# SPDX-License-Identifier: Apache-2.0
"""Filling up to r * (m + n) entries."""

from __future__ import annotations

import torch
from hypothesis import given

from shira import Adapter
from shira.fusing import fill_to_rank
from tests.adapters import adapters, delta, few, random_adapter


@few
@given(adapters())
def test_changes_no_value(adapter):
    r, filled = fill_to_rank(adapter)
    assert filled.compare(adapter).largest_difference == 0
    assert list(filled) == list(adapter)
    for name, part in filled.items():
        assert part.values.dtype == adapter[name].values.dtype
        assert part.support.union(adapter[name].support) == part.support
    if filled is not adapter:
        sides = {"one.weight": 8, "two.weight": 8, "conv.weight": 14}
        assert {name: part.nnz for name, part in filled.items()} == {
            name: r * sides[name] for name in filled
        }
        assert any(adapter[name].nnz > (r - 1) * sides[name] for name in filled) or r == 1


def test_by_hand():
    a = Adapter({"w": delta((3, 4), {0: 1.0, 2: 2.0, 11: 3.0})}, {"x": 1})
    r, filled = fill_to_rank(a)
    assert r == 1
    assert filled["w"].support.indices.tolist() == [0, 1, 2, 3, 4, 5, 11]
    assert filled["w"].values.tolist() == [1, 0, 2, 0, 0, 0, 3]
    assert filled.metadata == {"x": 1, "r": 1}


def test_no_room():
    a = random_adapter(1, {"w": (3, 4)}, k=9)  # 7 or 14 of 12 entries
    r, same = fill_to_rank(a)
    assert r == 1
    assert same is a


def test_nothing_to_fill():
    a = random_adapter(1, {"w": (6, 6)}, k=24)
    r, same = fill_to_rank(a)
    assert r == 2
    assert torch.equal(same["w"].support.indices, a["w"].support.indices)
    assert fill_to_rank(Adapter({}))[1] == Adapter({})
