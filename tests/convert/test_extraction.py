# SPDX-License-Identifier: Apache-2.0
"""The adapter between two models: exact, or the largest differences within a budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from shira import Adapter, SparseDelta, Support
from shira.base import replacement
from shira.convert import extract, merge
from shira.convert.extraction import exact_delta
from shira.errors import AdapterError, ConfigError, WrongBaseError
from tests.convert.conftest import applied, load, make_adapter, write_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def models(draw, spread=1.0):
    """A base of two weights and an adapter for it, of any dtype and density."""
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = 10.0 ** draw(st.integers(-6, 1))
    base, deltas = {}, {}
    for name in ("a.weight", "b.weight"):
        rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        base[name] = torch.randn(rows, cols, generator=generator).to(dtype)
        k = draw(st.integers(0, rows * cols // 2))
        flat = torch.randperm(rows * cols, generator=generator)[:k].sort().values
        values = torch.randn(k, generator=generator) * size
        deltas[name] = SparseDelta(Support((rows, cols), flat), values)
    return base, Adapter(deltas)


def replaced(base, adapter):
    """The values that take the place of the base's, by parameter and position."""
    return {
        name: (delta.support.indices.tolist(), delta.replacement(held).tolist())
        for name, delta in adapter.items()
        if (held := base[name].reshape(-1)[delta.support.indices.long()]) is not None
    }


@settings(max_examples=150, deadline=None)
@given(models())
def test_extract_of_base_and_base_plus_adapter_is_the_adapter(model):
    """The same replacement values at the same entries, but for deltas that rounding swallowed."""
    base, adapter = model
    tuned = applied(base, adapter)
    found = extract(base, tuned)
    assert found.exact
    assert all(delta.values.dtype == torch.float32 for delta in found.adapter.values()) or (
        base["a.weight"].dtype == torch.float64
    )
    alive = {}
    for name, delta in adapter.items():
        held = base[name].reshape(-1)[delta.support.indices.long()]
        kept = delta.replacement(held) != held
        if kept.any():
            support = Support(delta.support.shape, delta.support.indices[kept])
            alive[name] = SparseDelta(support, delta.values[kept])
    assert replaced(base, found.adapter) == replaced(base, Adapter(alive))
    again = applied(base, found.adapter)
    assert all(torch.equal(again[name], tuned[name]) for name in base)
    assert extract(base, again).adapter == found.adapter  # and so for good


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 32))
def test_deltas_that_add_without_rounding_come_back_bit_for_bit(seed, k):
    """On a grid that float32 holds, no sum is rounded, and the very values return."""
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randint(-(2**12), 2**12, (8, 8), generator=generator) / 2**10}
    flat = torch.randperm(64, generator=generator)[:k].sort().values
    values = torch.randint(1, 2**8, (k,), generator=generator) / 2**12
    adapter = Adapter({"w": SparseDelta(Support((8, 8), flat), values)})
    assert extract(base, applied(base, adapter)).adapter == adapter


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.floats(width=16), st.floats(width=16)), min_size=1, max_size=20),
)
def test_exact_deltas_of_any_two_values(dtype, pairs):
    pairs = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    base, tuned = torch.tensor(pairs, dtype=dtype).reshape(-1, 2).t().contiguous()
    delta, missed = exact_delta(base, tuned)
    assert missed == 0  # all are within 2^40 of one another: float64 reaches them
    assert torch.equal(replacement(base, delta), tuned)


def test_where_float32_does_not_reach_float64_does():
    base, tuned = torch.tensor([1.0, 1.0]), torch.tensor([1e-4, 2.0])
    assert replacement(base[:1], tuned[:1] - base[:1]) != tuned[:1]
    delta, missed = exact_delta(base, tuned)
    assert (delta.dtype, missed) == (torch.float64, 0)
    assert torch.equal(replacement(base, delta), tuned)


def test_what_even_float64_does_not_reach_is_counted():
    base, tuned = {"w": torch.tensor([1.0, 1.0, 5.0])}, {"w": torch.tensor([1.1e-20, 1.0, 5.0])}
    found = extract(base, tuned)
    assert not found.exact
    assert found.changes[0].missed == 1
    assert found.as_json()["missed"] == 1


def test_neighbours_of_the_nearest_delta_are_tried():
    """Half way between two float32, below a power of two: only the one further up will do."""
    odd = torch.arange(1, 2000, 2, dtype=torch.float64)
    base, tuned = -(0.5 + odd * 2.0**-24).float(), torch.ones(1000)
    wrong = replacement(base, tuned - base) != tuned
    assert 0 < wrong.sum() < 1000
    delta, missed = exact_delta(base, tuned)
    assert (delta.dtype, missed) == (torch.float32, 0)
    assert torch.equal(replacement(base, delta), tuned)


# From checkpoints


def test_from_sharded_checkpoints_and_back(checkpoint, tensors, adapter, tmp_path):
    merge(adapter, checkpoint, tmp_path / "tuned")
    seen = []
    found = extract(checkpoint, tmp_path / "tuned", progress=lambda *at: seen.append(at))
    assert found.exact
    assert found.adapter.keys() == adapter.keys()
    assert found.unchanged == len(tensors) - len(adapter)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert seen[-1] == (total, total)
    found.adapter.save(tmp_path / "found", format="peft")
    told = merge(tmp_path / "found", checkpoint, tmp_path / "again")
    assert {target.base for target in told.targets} == {"same"}
    again, tuned = load(tmp_path / "again"), load(tmp_path / "tuned")
    assert all(torch.equal(again[name], tuned[name]) for name in tuned)
    assert found.adapter.metadata["base_model_name_or_path"] == str(checkpoint)


def test_modules_mappings_and_files_agree(tmp_path):
    torch.manual_seed(0)
    base, tuned = nn.Linear(6, 5), nn.Linear(6, 5)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.weight[2, 3] += 1
        tuned.bias[1] -= 1
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    transposed = {k: v.t().contiguous().t() for k, v in tuned.state_dict().items()}
    first = extract(base, tuned).adapter
    assert {name: delta.support.indices.tolist() for name, delta in first.items()} == {
        "weight": [15],
        "bias": [1],
    }
    assert extract(tmp_path / "base.safetensors", tuned.state_dict()).adapter == first
    assert extract(base, transposed).adapter == first


def test_pieces_join(tmp_path, monkeypatch):
    monkeypatch.setattr("shira.checkpoints.models.PIECE", 7)
    base = {"w": torch.randn(9, 11), "empty": torch.empty(0, 3)}
    adapter = make_adapter(base, ["w"], k=40)
    tuned = applied(base, adapter)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / name)
    for options in ({}, {"density": 0.9}, {"density": 0.5, "everywhere": True}):
        found = extract(tmp_path / "base", tmp_path / "tuned", **options)
        assert torch.equal(found.adapter["w"].support.indices, adapter["w"].support.indices)
        assert found.exact


# With a budget


@pytest.fixture
def full(tensors):
    """A model that was tuned in full: every entry differs."""
    torch.manual_seed(1)
    return {
        n: (t.float() + torch.randn(t.shape).sign() * 0.5).to(t.dtype) for n, t in tensors.items()
    }


def test_a_model_tuned_in_full_needs_a_budget(tensors, full):
    with pytest.raises(AdapterError, match=r"more than 50% .* tuned in full\. Give a budget"):
        extract(tensors, full)
    other = {name: tensor.double() for name, tensor in full.items()}
    with pytest.raises(AdapterError, match="has other dtypes"):
        extract(tensors, other)


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_largest_differences_and_their_energy(tensors, full, everywhere):
    found = extract(tensors, full, density=0.2, everywhere=everywhere)
    differences = {n: (full[n].float() - tensors[n].float()) for n in tensors}
    energy = sum(d.square().sum().item() for d in differences.values())
    held = 0.0
    if everywhere:
        together = torch.cat([d.abs().flatten() for d in differences.values()])
        count = sum(round(0.2 * t.numel()) for t in tensors.values())
        limit = together.sort(descending=True).values[count - 1]
    for name, difference in differences.items():
        size = difference.abs().flatten()
        if not everywhere:
            limit = size.sort(descending=True).values[round(0.2 * size.numel()) - 1]
        if name in found.adapter:
            chosen = found.adapter[name].support.indices.long()
            assert (size[chosen] >= limit).all()
            rest = size.clone()
            rest[chosen] = 0
            assert (rest <= limit).all()
            held += size[chosen].square().sum().item()
    assert found.energy_share == pytest.approx(held / energy, rel=1e-6)
    assert 0 < found.energy_share < 1
    assert not found.exact
    assert found.adapter.nnz == sum(round(0.2 * t.numel()) for t in tensors.values())
    merged = applied(tensors, found.adapter)
    for name, delta in found.adapter.items():  # those that are kept are exact
        where = delta.support.indices.long()
        assert torch.equal(merged[name].view(-1)[where], full[name].view(-1)[where])


def test_the_budget_of_a_lora(tensors, full):
    found = extract(tensors, full, r=1)
    assert {name: delta.nnz for name, delta in found.adapter.items()} == {
        "model.embed_tokens.weight": 28,
        "model.layers.0.q.weight": 16,
        "model.layers.0.up.weight": 20,
        "model.layers.1.q.weight": 16,
        "model.layers.1.up.weight": 20,
        "model.norm.weight": 8,  # whole
        "lm_head.weight": 28,
    }


def test_a_budget_that_is_enough_is_exact(tensors, adapter):
    found = extract(tensors, applied(tensors, adapter), density=0.5)
    assert found.exact
    assert found.energy_share == 1
    assert found.adapter == extract(tensors, applied(tensors, adapter)).adapter


def test_include_and_exclude(tensors, full):
    found = extract(tensors, full, density=0.1, include=["*.up.*", "lm_head*"], exclude=["lm_*"])
    assert found.adapter.keys() == {"model.layers.0.up.weight", "model.layers.1.up.weight"}
    assert len(found.excluded) == 5
    assert found.only_in_base == found.only_in_tuned == ()
    with pytest.raises(AdapterError, match=r"no parameter .* is left"):
        extract(tensors, full, include=["*.down.*"])


def test_models_that_differ_in_more_than_values(tensors, full, tmp_path):
    tuned = {**full, "score.weight": torch.ones(2, 8), "norm.count": torch.tensor(1)}
    tuned.pop("lm_head.weight")
    found = extract(tensors, tuned, density=0.1)
    assert found.not_compared == ("norm.count",)
    assert found.only_in_base == ("lm_head.weight",)
    assert found.only_in_tuned == ("score.weight",)
    tuned["model.norm.weight"] = torch.ones(9)
    with pytest.raises(WrongBaseError, match=r"'model.norm.weight' has shape \(8,\)"):
        extract(tensors, tuned, density=0.1)
    with pytest.raises(WrongBaseError, match="share no parameter"):
        extract(tensors, {"x": torch.ones(2)})
    prefixed = {f"wrapped.{name}": tensor for name, tensor in full.items()}
    same = extract(tensors, full, density=0.1).adapter
    assert extract(tensors, prefixed, density=0.1).adapter == same
    found = extract(tensors, prefixed, density=0.1, exclude=["*norm*"])
    assert found.excluded
    assert found.only_in_base == found.only_in_tuned == ()


def test_a_model_on_the_meta_device_has_no_values(tensors, full):
    away = {name: tensor.to("meta") for name, tensor in full.items()}
    for base, tuned in ((away, full), (tensors, away)):
        with pytest.raises(AdapterError, match=r"the state dict: '.*' has no values.*checkpoint"):
            extract(base, tuned, density=0.1)


def test_values_that_are_not_finite(tensors, full):
    full["model.norm.weight"][3] = math.nan
    with pytest.raises(AdapterError, match=r"'model.norm.weight': .*not finite"):
        extract(tensors, full, density=0.1)


@pytest.mark.parametrize(
    "options",
    [{"density": 0}, {"density": 1.5}, {"r": 0}, {"r": 1, "density": 0.1}, {"everywhere": True}],
)
def test_budgets_that_cannot_be(tensors, options):
    with pytest.raises(ConfigError):
        extract(tensors, tensors, **options)


def test_the_same_model_twice(checkpoint):
    found = extract(checkpoint, checkpoint)
    assert (found.exact, found.adapter.nnz, found.energy_share) == (True, 0, 1.0)


def test_integers_are_passed_over(tmp_path):
    base = {"w": torch.ones(2, 2), "position_ids": torch.arange(3)}
    tuned = {"w": torch.tensor([[1.0, 2.0], [1.0, 1.0]]), "position_ids": torch.arange(3)}
    write_checkpoint(tmp_path / "base", base, {"model.safetensors": [*base]})
    assert extract(tmp_path / "base", tuned).adapter.nnz == 1
