# SPDX-License-Identifier: Apache-2.0
"""Whole tensors of adapters: carried by every operator, or refused by name."""

from __future__ import annotations

import pytest
import torch

from shira import Adapter, fuse, overlap
from shira.errors import AdapterError, ConfigError, UnknownAdapterError
from shira.fusing import METHODS, fill_to_rank
from tests.adapters import SHAPES, delta, random_adapter

HEAD = torch.tensor([[1.0, -2.0], [3.0, 0.1]])


def with_head(seed, head=HEAD, name="head.weight") -> Adapter:
    sparse = random_adapter(seed)
    return Adapter(sparse, {"modules_to_save": ["head"]}, {name: head})


def test_an_adapter_has_them_beside_its_deltas():
    adapter = with_head(1)
    assert list(adapter) == list(SHAPES)
    assert (adapter.nnz, adapter.density) == (random_adapter(1).nnz, random_adapter(1).density)
    assert repr(adapter).endswith(", 1 whole tensors)")
    assert adapter == with_head(1, HEAD.clone())
    for other in (HEAD + 1, HEAD.double(), HEAD[:1]):
        assert adapter != with_head(1, other)
    assert adapter != with_head(1, name="score.weight")
    assert adapter != random_adapter(1)
    trained = torch.nn.Parameter(HEAD.clone())
    assert not with_head(1, trained).tensors["head.weight"].requires_grad


def whole(adapter: Adapter) -> Adapter:
    """The whole tensors alone."""
    return Adapter({}, None, adapter.tensors)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"one.weight": HEAD}, "'one.weight' has a delta and a whole tensor"),
        ({"head": [1.0]}, "not 'head' as list"),
        ({3: HEAD}, "not 3 as Tensor"),
    ],
)
def test_what_cannot_be_one(tensors, match):
    with pytest.raises(AdapterError, match=match):
        Adapter(random_adapter(1), None, tensors)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads", [(HEAD, HEAD.clone()), (HEAD, None), (None, HEAD)])
def test_fusing_carries_what_does_not_differ(method, heads):
    parts = [random_adapter(s) if h is None else with_head(s, h) for s, h in enumerate(heads)]
    fused = fuse(parts, method=method)
    assert fused.tensors.keys() == {"head.weight"}
    assert torch.equal(fused.tensors["head.weight"], HEAD)
    assert dict(fused) == dict(fuse([Adapter(part) for part in parts], method=method))


def test_two_different_ones_are_refused_unless_told_which():
    a, b = with_head(1), with_head(2, HEAD + 1)
    with pytest.raises(AdapterError, match=r"x and y hold different tensors .*'head.weight'"):
        fuse([a, b], names=["x", "y"])
    with pytest.raises(AdapterError, match="adapter 0 and adapter 1 hold different"):
        a + b
    for name, head in (("x", HEAD), ("y", HEAD + 1)):
        fused = fuse([a, b], [0.5, 0.5], names=["x", "y"], whole=name)
        assert torch.equal(fused.tensors["head.weight"], head)
    beside = with_head(2, name="score.weight")
    assert list((a + beside).tensors) == ["head.weight", "score.weight"]
    assert "modules_to_save" not in (a + beside).metadata
    assert list(fuse([a, beside], whole="adapter 1").tensors) == ["score.weight"]


@pytest.mark.parametrize("name", ["z", "adapter 1"])
def test_the_name_of_the_one_that_is_taken(name):
    with pytest.raises(ConfigError, match=f"whole='{name}' is the name of 0 of the adapters"):
        fuse([with_head(1)], whole=name)
    with pytest.raises(ConfigError, match="is the name of 2 of the adapters"):
        fuse([with_head(1), with_head(2)], names=["x", "x"], whole="x")


def test_a_whole_tensor_has_no_scale():
    a, b = with_head(1), random_adapter(2)
    for scaled in (lambda: a * 0.5, lambda: -a, lambda: a / 2, lambda: b - a, lambda: 0 * a):
        with pytest.raises(AdapterError, match=r"'head.weight'.*have no scale; whole='adapter"):
            scaled()
    assert a * 1 == a
    assert whole(a - b) == whole(a)
    assert whole(fuse([a], [0.5], whole="adapter 0")) == whole(a)
    assert a.restrict(list(a)) * 0.5 == random_adapter(1) * 0.5


def test_what_is_whole_in_one_and_sparse_in_another_is_refused():
    with pytest.raises(AdapterError, match="whole tensor in adapter 1 and has a delta in adapter"):
        Adapter({"w": delta((2, 2), {0: 1.0})}) + Adapter({}, None, {"w": HEAD})


def test_other_operators_carry_them():
    a = with_head(1)
    assert whole(a.prune(3)) == whole(a)
    assert a.to(torch.bfloat16).tensors["head.weight"].dtype == torch.float32
    assert whole(a.to(device="cpu")) == whole(a)
    assert whole(fill_to_rank(a)[1]) == whole(a)
    assert a.prune(3).metadata["modules_to_save"] == ["head"]


def test_restricting_goes_by_name():
    a = with_head(1)
    assert whole(a.restrict(["one.weight", "head.weight"])) == whole(a)
    assert a.restrict(lambda name: name == "head.weight") == Adapter({}, None, a.tensors)
    sparse = a.restrict(list(a))
    assert (sparse, "modules_to_save" in sparse.metadata) == (random_adapter(1), False)
    assert a.restrict(a) == a
    assert a.restrict(random_adapter(1)).tensors == {}
    with pytest.raises(AdapterError, match=r"'head.weight' is a whole tensor, which has no"):
        a.restrict({"head.weight": a["one.weight"].support})
    with pytest.raises(UnknownAdapterError, match=r"Did you mean 'head.weight'"):
        a.restrict(["head.weigth"])


def test_comparing_names_them():
    a, b = with_head(1), with_head(1, HEAD + 1)
    assert a.compare(with_head(1)).equal
    for other in (b, random_adapter(1), with_head(1, HEAD.double())):
        found = a.compare(other)
        assert (found.equal, found.unlike_whole) == (False, ("head.weight",))
        assert "unlike whole: 'head.weight'" in str(found)
    only = Adapter(random_adapter(1), None, {"score.weight": HEAD})
    states = overlap(Adapter(b, None, {**b.tensors, "n": HEAD}), a + only).whole
    assert states == {"head.weight": "different", "n": "only in a", "score.weight": "only in b"}
    assert overlap(a, a).as_json()["whole_tensors"] == {"head.weight": "equal"}
    assert "whole tensor head.weight: equal" in str(overlap(a, a))
