# SPDX-License-Identifier: Apache-2.0
"""Positions in a byte each: they come back, every op and the kernels take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import Support, ops
from shira.base import replacement
from shira.errors import SupportError
from shira.masks import random_support
from shira.ops import gaps, make_plan, native
from shira.ops.gaps import gaps_of, is_packed, pack, support_of, unpack

from .cases import needs_kernels, random_indices, supported, torch_threads


def packed(support: Support) -> torch.Tensor:
    """Whatever its density."""
    return torch.from_numpy(gaps.encode(support.indices.numpy(), widest="U8"))


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_positions_come_back(data):
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    numel = int(np.prod(shape))
    support = random_support(shape, data.draw(st.integers(1, numel)), seed=numel)
    coordinates = support.coordinates()
    small = pack(coordinates, shape)
    assert is_packed(small) == (support.density > 1 / 200)
    assert torch.equal(unpack(small, shape), coordinates)
    assert support_of(small, shape) == support
    assert pack(small, shape) is small


@needs_kernels
def test_what_is_not_packed():
    few = random_support((100, 100), 50, seed=0).coordinates()
    placeholder = torch.zeros(2, 60, dtype=torch.int32)
    meta = torch.empty(2, 60, dtype=torch.int32, device="meta")
    empty = torch.empty(2, 0, dtype=torch.int32)
    for coordinates in (few, placeholder, meta, empty):
        assert pack(coordinates, (100, 100)) is coordinates


@needs_kernels
def test_bytes_of_a_position():
    support = random_support((1024, 1024), 2 * 1024 * 1024 // 100, seed=0)
    assert pack(support.coordinates(), support.shape).numel() < 1.01 * support.nnz
    clustered = Support((1000, 1000), torch.arange(5001))  # one gap, as long as the weight
    assert pack(clustered.coordinates(), clustered.shape).numel() == clustered.nnz
    alone = Support((1000, 1000), torch.cat((torch.arange(5000), torch.tensor([999_999]))))
    assert pack(alone.coordinates(), alone.shape).numel() < 1.8 * alone.nnz


@needs_kernels
def test_made_without_gradients_they_serve_training_too():
    coordinates = random_indices((20, 30), 60)
    with torch.inference_mode():
        small = pack(coordinates, (20, 30))
    values = torch.zeros(60, requires_grad=True)
    x, weight = torch.randn(4, 30), torch.randn(20, 30)
    ops.linear(x, weight, None, [values], [small]).sum().backward()
    assert values.grad.abs().sum() > 0
    assert ops.plan_for([small], (20, 30), (30, 1)) is ops.plan_for([small], (20, 30), (30, 1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint32, torch.uint64])
def test_units_that_no_kernel_walks_are_refused(dtype):
    with pytest.raises(SupportError, match="the indices of an active adapter are unusable"):
        make_plan([torch.tensor([1, 0, 1]).to(dtype)], (4, 4), (4, 1))


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("backend", ["native", "sampled", "chunked"])
def test_every_op_takes_them(with_kernels, backend, monkeypatch):
    if not with_kernels or native.load().library is None:
        monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "none"))
        if backend == "native":
            pytest.skip("needs the compiled kernels")
    generator = torch.Generator().manual_seed(0)
    supports = [random_support((33, 47), 100 + 9 * i, seed=i) for i in range(2)]
    kinds = {
        "coordinates": [support.coordinates() for support in supports],
        "packed": [packed(support) for support in supports],
        "mixed": [supports[0].coordinates(), packed(supports[1])],
    }
    x, weight, kernel, grad, image = (
        torch.randn(shape, generator=generator)
        for shape in ((5, 47), (33, 47), (33, 47, 1, 1), (5, 33), (1, 47, 6, 6))
    )
    ids = torch.tensor([3, 3, 0, 32])
    answers = {}
    for kind, indices in kinds.items():
        values = [torch.full((s.nnz,), 0.5, requires_grad=True) for s in supports]
        with ops.use_backend(backend):
            outputs = [
                ops.linear(x, weight, None, values, indices),
                ops.embedding(ids, weight, values, indices),
                ops.conv2d(image, kernel, None, values, indices),
            ]
            for one, index in zip(values, indices, strict=True):
                outputs.append(ops.sparse_product(x, one, index, (33, 47)))
                outputs.append(ops.sparse_product(grad, one, index, (33, 47), transposed=True))
            sum(output.square().sum() for output in outputs).backward()
        looked_up = [ops.looked_up(ids, index, (33, 47)) for index in indices]
        answers[kind] = [
            *(output.detach() for output in outputs),
            *(one.grad for one in values),
            *(part for pair in looked_up for part in pair),
        ]
    for kind in ("packed", "mixed"):
        for got, want in zip(answers[kind], answers["coordinates"], strict=True):
            assert torch.equal(got, want)


@needs_kernels
@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", list(native.KINDS))
@pytest.mark.parametrize(
    ("shape", "nnz"),
    [
        ((512, 1024), 10_486),  # 2 %: some gaps are wider than a byte
        ((512, 1024), 2700),  # a third of them are
        ((900, 1000), 40),  # in two bytes
        ((3, 700_001), 9),  # none fits into two
        ((2048, 8), 16_384),  # all entries; more blocks than threads
        ((40_000, 3), 9000),  # many rows without any
        ((1, 30_000), 9000),
        ((1, 1), 1),
    ],
)
def test_the_kernels_walk_along_them(instruction_set, threads, dtype, shape, nnz):
    if instruction_set not in supported():
        pytest.skip(f"this CPU has no {instruction_set}")
    kernels = native.kernels_for(instruction_set)
    support = random_support(shape, nnz, seed=1)
    want_row, want_col = support.coordinates()
    weight = torch.randn(shape).to(dtype)
    before, delta, flat = weight.clone(), torch.randn(nnz), support.indices.long()
    want = before.clone()
    want.view(-1)[flat] = replacement(before.view(-1)[flat], delta)
    codes = [gaps_of(support), gaps_of(support, packed(support))]
    for code in codes:
        with torch_threads(threads):
            crow, row, col = kernels.coordinates(code, shape, True)
            again = kernels.coordinates(code, shape, False)
            write = native.DeltaWrite(kernels, weight, code, delta)
            write.put_in()
            assert torch.equal(weight, want)
            write.put_back()
        assert torch.equal(weight, before)
        assert torch.equal(write.originals, before.view(-1)[flat])
        assert torch.equal(row, want_row)
        assert torch.equal(col, want_col)
        assert torch.equal(
            crow[1:].diff(prepend=crow[:1]), torch.bincount(want_row, minlength=shape[0])
        )
        assert crow[0] == 0
        assert torch.equal(again[0], crow)
        assert torch.equal(again[2], col)


def test_a_union_of_few_without_the_kernels(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "none"))
    shape = (300, 400)
    supports = [random_support(shape, 40, seed=seed) for seed in range(2)]
    plan = make_plan([packed(support) for support in supports], shape, (400, 1))
    assert plan.gaps.units.dtype == torch.uint16
    union = supports[0].union(supports[1])
    assert torch.equal(torch.stack(plan.pattern()[1:]), union.coordinates())
    assert torch.equal(torch.stack(plan.compressed()[1:]), union.coordinates()[1:])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 4])
def test_gaps_beyond_32_bits(threads):
    shape = (1_000_000, 9000)
    at = [5, 17, 4_400_000_000, 4_400_000_001, 8_999_999_999]
    support = Support(shape, torch.tensor(at))
    with torch_threads(threads):
        found = native.load().library.coordinates(gaps_of(support), shape, True)
    crow, row, col = found
    assert [r * 9000 + c for r, c in zip(row.tolist(), col.tolist(), strict=True)] == at
    assert torch.equal(crow[1:].diff(prepend=crow[:1]), torch.bincount(row, minlength=shape[0]))


def test_a_plan_of_packed_positions_keeps_no_rows_and_columns():
    support = random_support((64, 64), 400, seed=0)
    plan = make_plan([packed(support)], (64, 64), (64, 1))
    assert plan.kept is None
    assert torch.equal(torch.stack(plan.pattern()[1:]), support.coordinates())
    assert torch.equal(plan.flat(), support.indices.long())
    kept = make_plan([support.coordinates()], (64, 64), (64, 1))
    assert all(torch.equal(a, b) for a, b in zip(plan.pattern(), kept.pattern(), strict=True))
