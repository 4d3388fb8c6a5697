# SPDX-License-Identifier: Apache-2.0
"""`Exchange` against a dictionary: entries of both patches, and no others, hold what they must."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shira.ops import native
from shira.ops.patch import ChangedEntryError, Exchange, Exchanges, Overwritten, Patch, base_at

from .cases import supported


@pytest.fixture(params=["torch", "base", "avx2", "avx512"], autouse=True)
def way(request, monkeypatch):
    """Plain torch, and the compiled walk for each instruction set."""
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "not wanted"))
        return
    if native.load().library is None or request.param not in supported():
        pytest.skip(f"no compiled kernels for {request.param} here")
    kernels = native.kernels_for(request.param)
    monkeypatch.setattr(native, "load", lambda: native.Loaded(kernels, ""))


def exchange(weight, before, after, check=True):
    Exchange(weight, before, after, check=check).run()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def patch_on(weight, offsets, seed):
    generator = torch.Generator().manual_seed(seed)
    at = torch.tensor(sorted(offsets), dtype=torch.int32)
    new = torch.randn(len(offsets), generator=generator).to(weight.dtype)
    return Patch(at, weight.view(-1)[at.long()].clone(), new)


def after_all(base, patch):
    want = base.clone()
    if patch is not None:
        want.view(-1)[patch.offsets.long()] = patch.replacement
    return want


supports = st.one_of(st.none(), st.sets(st.integers(0, 299), max_size=60))


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(DTYPES),
    first=supports,
    second=supports,
    spoilt=st.one_of(st.none(), st.integers(0, 299)),
)
def test_exchange(dtype, first, second, spoilt):
    base = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = base.clone()
    before = None if first is None else patch_on(weight, first, 1)
    after = None if second is None else patch_on(weight, second, 2)
    exchange(weight, None, before)
    assert torch.equal(weight, after_all(base, before))
    if spoilt is not None:
        weight[spoilt] = 99.0
        found = weight.clone()
        if spoilt in (first or set()) | (second or set()):
            for method in (Exchange.compare, Exchange.run):
                made = Exchange(weight, before, after)
                with pytest.raises(ChangedEntryError) as caught:
                    method(made)
                assert (caught.value.exchange, caught.value.offset) == (made, spoilt)
                assert torch.equal(weight, found)
            exchange(weight, before, after, check=False)
        else:
            Exchange(weight, before, after).compare()
            assert torch.equal(weight, found)
            exchange(weight, before, after)
            base[spoilt] = 99.0
    else:
        exchange(weight, before, after)
    assert torch.equal(weight, after_all(base, after))
    exchange(weight, after, before)
    exchange(weight, before, None)
    assert torch.equal(weight, base)


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_an_unchecked_exchange_ends_the_same_from_anywhere_between(done):
    base = torch.randn(1000)
    weight = base.clone()
    before, after = patch_on(weight, range(0, 900, 3), 1), patch_on(weight, range(0, 900, 2), 2)
    exchange(weight, None, before)
    held = weight.clone()
    exchange(weight, before, after)
    mixed = torch.where(torch.rand(1000) < done, weight, held)
    weight.copy_(mixed)
    exchange(weight, after, before, check=False)
    assert torch.equal(weight, held)


def test_large_patches_are_shared_among_threads():
    torch.manual_seed(0)
    base = torch.randn(2_000_000).bfloat16()
    weight = base.clone()
    patches = [
        patch_on(weight, torch.randperm(2_000_000)[:200_000].tolist(), seed) for seed in range(2)
    ]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        exchange(weight, None, patches[0])
        exchange(weight, patches[0], patches[1])
        assert torch.equal(weight, after_all(base, patches[1]))
        at = patches[0].offsets[100_123].long()
        kept = weight[at].clone()
        weight[at] = 5.0
        found = weight.clone()
        with pytest.raises(ChangedEntryError) as caught:
            exchange(weight, patches[1], patches[0])
        assert caught.value.offset == at
        assert torch.equal(weight, found)
        weight[at] = kept
        exchange(weight, patches[1], None)
        assert torch.equal(weight, base)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("broken", [None, 1])
def test_of_several_exchanges_all_or_none_last(broken):
    bases = [torch.randn(100, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weights = [base.clone() for base in bases]
    steps = [
        Exchange(weight, None, patch_on(weight, range(0, 90, 7), seed))
        for seed, weight in enumerate(weights)
    ]
    exchanges = Exchanges(steps)
    if broken is None:
        exchanges.run()
        for weight, base, step in zip(weights, bases, steps, strict=True):
            assert torch.equal(weight, after_all(base, step.after))
        exchanges.roll_back()
        exchanges.roll_back()
    else:
        bases[broken][7] = weights[broken][7] = 99.0
        for method in (exchanges.compare, exchanges.run):
            with pytest.raises(ChangedEntryError) as caught:
                method()
            assert caught.value.exchange is steps[broken]
    assert all(map(torch.equal, weights, bases))


def test_the_base_under_patches():
    base = torch.arange(12.0).view(3, 4).t()
    weight = base.clone()
    assert weight.stride() == base.stride()
    inner = Overwritten(torch.tensor([1, 4, 7], dtype=torch.int32), torch.tensor([1.0, 4.0, 7.0]))
    weight.t().view(-1)[inner.offsets.long()] = 50.0
    outer = Overwritten(torch.tensor([4, 5]), torch.tensor([50.0, 5.0]))
    weight.t().view(-1)[outer.offsets] = 60.0
    for dtype in (torch.int32, torch.int64):
        at = torch.tensor([11, 4, 5, 1, 0], dtype=dtype)
        found = base_at(weight, at, outer, None, inner, Overwritten(at[:0], base.reshape(-1)[:0]))
        assert found.tolist() == at.tolist()
    assert base_at(weight, at[:0], outer, inner).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_mode_of_torch_is_entered(monkeypatch, dtype):
    """An interrupt would leave its guard behind, which sets the gradient mode later on."""
    with torch.inference_mode():
        made_in_it = torch.zeros(300, dtype=dtype)
    for weight in (torch.zeros(300, dtype=dtype), made_in_it):
        patch = patch_on(weight, {3, 7, 8}, seed=1)
        with monkeypatch.context() as patched:
            patched.setattr(torch.no_grad, "__enter__", None)
            patched.setattr(torch.inference_mode, "__enter__", None)
            exchange(weight, None, patch)
            assert torch.equal(weight, after_all(torch.zeros(300, dtype=dtype), patch))
            undone = Exchange(weight, patch, None)
            undone.run()
            assert not weight.any()
            undone.roll_back()
            assert torch.equal(weight, after_all(torch.zeros(300, dtype=dtype), patch))
