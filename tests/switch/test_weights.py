# SPDX-License-Identifier: Apache-2.0
"""The state machine by itself: exchanges that others must agree to, and summed adapters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shira import SparseDelta, Support
from shira.errors import AdapterError
from shira.switch.weights import (
    ChangedWeightError,
    PatchedWeights,
    State,
    combined,
    make_entry,
)


@dataclass(frozen=True, eq=False)
class Place:
    name: str
    weight: Tensor


@pytest.fixture
def places():
    return [Place(name, torch.arange(6.0).reshape(2, 3)) for name in ("one", "two")]


def entries(places, index, value):
    delta = SparseDelta(Support((2, 3), torch.tensor([index, 5])), torch.tensor([value, 1.0]))
    return {place: make_entry(delta, place.weight, None)[0] for place in places}


def held(places):
    return [place.weight.flatten().tolist() for place in places]


def test_what_others_refuse_is_taken_back(places):
    weights, before = PatchedWeights(), held(places)
    after = State((("a", 1.0),), combined([("a", 1.0, entries(places, 0, 0.5))]))

    def together(write):
        write()
        assert held(places) == [[0.5, 1, 2, 3, 4, 6]] * 2
        raise RuntimeError("another process could not")

    with pytest.raises(RuntimeError, match="another process"):
        weights.exchange(after, together=together)
    assert held(places) == before
    assert weights.state == State()
    assert not weights.unfinished
    weights.exchange(after)
    assert weights.state is after
    weights.exchange(State())
    assert held(places) == before


def test_comparing_writes_nothing_and_names_the_entry(places):
    weights = PatchedWeights()
    plan = combined([("a", 1.0, entries(places, 3, 0.5))])
    weights.compare(plan)
    places[1].weight[1, 0] = 9
    before = held(places)
    with pytest.raises(ChangedWeightError) as caught:
        weights.compare(plan)
    assert caught.value.entry == "entry (1, 0) of 'two'"
    assert held(places) == before


def test_sums_are_rounded_once_and_must_be_finite(places):
    a, b = entries(places, 0, 0.5), entries(places[:1], 1, 3e38)
    plan = combined([("a", 2.0, a), ("b", 1.0, b)])
    assert plan[places[0]].offsets.tolist() == [0, 1, 5]
    assert plan[places[0]].replacement.tolist() == [1.0, torch.tensor(3e38).item(), 8.0]
    assert plan[places[1]].replacement.tolist() == [1.0, 7.0]
    with pytest.raises(AdapterError, match=r"\{'a': 2.0, 'b': 9.0\}, parameter 'one'.*inf"):
        combined([("a", 2.0, a), ("b", 9.0, b)])
