# SPDX-License-Identifier: Apache-2.0
"""Every way to the weight gradient against the dense product, and how one is chosen."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import allocator_peak
from shira.blocks import support_of_blocks
from shira.errors import ConfigError
from shira.ops import (
    choose,
    make_plan,
    native,
    set_scratch_bytes,
    use_backend,
    weight_gradient,
)
from shira.ops.gradient import BACKENDS, batched, chunked, sampled, scratch_bytes

from ..cases import close, dense, kernels_of, needs_kernels, operands, random_indices, torch_threads

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def scratch():
    before = scratch_bytes()
    yield set_scratch_bytes
    set_scratch_bytes(before)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    tokens=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    size=st.sampled_from([1, 200, 2**20]),
)
def test_every_way_equals_the_dense_product(rows, cols, tokens, share, dtype, strided, size):
    k = round(rows * cols * share)
    indices = random_indices((rows, cols), k)
    plan = make_plan([indices], (rows, cols), (cols, 1))
    left, right = operands(tokens, rows, cols, dtype, strided)
    want = dense(left, right, indices)
    wide, kept = want.dtype, scratch_bytes()
    set_scratch_bytes(size)
    try:
        for way in (sampled, chunked) if k else (chunked,):
            got = way(left, right, plan, wide)
            assert got.shape == (k,)
            assert got.dtype == wide
            assert close(got, want, wide)
        assert close(weight_gradient(left, right, plan), want, wide)
    finally:
        set_scratch_bytes(kept)


def test_sampled_adds_up_pieces_of_the_tokens():
    indices = random_indices((6, 7), 12)
    plan = make_plan([indices], (6, 7), (7, 1))
    left, right = operands(600, 6, 7, torch.float64)
    assert close(
        sampled(left, right, plan, torch.float64), dense(left, right, indices), torch.float64
    )


@needs_kernels
@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512"])
@settings(deadline=None, max_examples=40)
@given(  # more rows, columns and tokens than are taken at a time, too
    rows=st.one_of(st.integers(1, 70), st.sampled_from([257, 600])),
    cols=st.one_of(st.integers(1, 70), st.sampled_from([600, 5000])),
    tokens=st.integers(1, 300),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES[1:]),
    threads=st.integers(1, 5),
    gap=st.sampled_from([0, 3]),
)
def test_compiled_entries_equal_the_dense_product(
    instruction_set, rows, cols, tokens, share, dtype, threads, gap
):
    kernels = kernels_of(instruction_set)
    indices = random_indices((rows, cols), round(rows * cols * share))
    plan = make_plan([indices], (rows, cols), (cols, 1))
    left, right = operands(tokens, rows + gap, cols + gap, dtype)
    left, right = left[:, gap:], right[:, gap:]
    with torch_threads(threads):
        got = kernels.entries(left, right, *plan.compressed())
        again = kernels.entries(left, right, *plan.compressed())
    assert torch.equal(got, again)  # the same bits for the same number of threads
    assert close(got, dense(left, right, indices), torch.float32)


@needs_kernels
@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512"])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_tiles_equal_the_dense_product(instruction_set, data):
    kernels = kernels_of(instruction_set)
    rows, cols = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    size = data.draw(st.sampled_from([8, 16, 32, 64]))
    tokens = data.draw(st.sampled_from([1, 7, 128, 200]))
    dtype = data.draw(st.sampled_from(DTYPES))
    across = -(-cols // size)
    blocks = -(-rows // size) * across
    ids = data.draw(st.lists(st.integers(0, blocks - 1), min_size=1, unique=True))
    last = ids[-1]
    room = min(size, rows - last // across * size) * min(size, cols - last % across * size)
    cut = data.draw(st.one_of(st.none(), st.integers(1, room - 1))) if room > 1 else None
    support = support_of_blocks((rows, cols), size, torch.tensor(ids), cut)
    plan = make_plan([support.coordinates()], (rows, cols), (cols, 1))
    if plan.tiles is None:  # a cut block alone may have no structure
        return
    left, right = operands(tokens, rows, cols, dtype)
    want = dense(left, right, support.coordinates())
    assert close(BACKENDS["tiles"].compute(left, right, plan, want.dtype), want, want.dtype)
    assert close(batched(left, right, plan, want.dtype), want, want.dtype)
    if dtype != torch.float64:
        with torch_threads(data.draw(st.integers(1, 3))):
            got = kernels.tiles(left, right, *plan.compressed(), plan.tiles)
        assert close(got, want, torch.float32)


def test_the_bound_on_scratch_memory_holds():
    rows, cols, k = 512, 256, 2000  # a dense gradient of 512 KiB
    plan = make_plan([random_indices((rows, cols), k)], (rows, cols), (cols, 1))
    left, right = torch.randn(16, rows), torch.randn(16, cols)
    kept = scratch_bytes()
    try:
        set_scratch_bytes(2**15)
        peak = allocator_peak(lambda: chunked(left, right, plan, torch.float32))
        # one piece beside its successor, the result, and places and values of a piece's entries
        assert peak < 3 * 2**15 + 6 * 4 * k
        set_scratch_bytes(2**20)
        assert allocator_peak(lambda: chunked(left, right, plan, torch.float32)) > rows * cols * 4
    finally:
        set_scratch_bytes(kept)


def test_batched_tiles_some_at_a_time(scratch):
    support = support_of_blocks((40, 24), 8, torch.tensor([0, 5, 7, 14]))
    plan = make_plan([support.coordinates()], (40, 24), (24, 1))
    left, right = operands(5, 40, 24, torch.float32)
    scratch(1)
    got = batched(left, right, plan, torch.float32)
    assert close(got, dense(left, right, support.coordinates()), torch.float32)


def test_no_tokens_no_gradient():
    plan = make_plan([random_indices((4, 5), 6)], (4, 5), (5, 1))
    got = weight_gradient(torch.randn(0, 4), torch.randn(0, 5), plan)
    assert torch.equal(got, torch.zeros(6))


@needs_kernels
@pytest.mark.parametrize(
    ("device", "dtype", "density", "tiled", "name", "word"),
    [
        ("cpu", torch.float32, 0.02, True, "tiles", "fills"),
        ("cpu", torch.float32, 0.02, False, "native", "tiles"),
        ("cpu", torch.bfloat16, 0.02, False, "native", "tiles"),
        ("cpu", torch.float64, 0.02, False, "sampled", "float64"),
        ("cpu", torch.float32, 0.5, False, "chunked", "0.5"),
        ("cuda", torch.float32, 0.02, False, "chunked", "cuda"),
        ("cuda", torch.bfloat16, 0.02, False, "chunked", 'take mask_type="block"'),
        ("cuda", torch.bfloat16, 0.02, True, "tiles", "fills"),
    ],
)
def test_the_choice_says_why(device, dtype, density, tiled, name, word):
    choice = choose(device, dtype, density, tiled=tiled)
    assert choice.name == name
    assert word in choice.why


def test_a_backend_can_be_asked_for(monkeypatch):
    plan = make_plan([random_indices((4, 5), 6)], (4, 5), (5, 1))
    left, right = operands(3, 4, 5, torch.float32)
    with use_backend("chunked"):
        assert choose("cpu", torch.float32, 0.02).name == "chunked"
        one = weight_gradient(left, right, plan)
    monkeypatch.setitem(os.environ, "SHIRA_BACKEND", "sampled")
    assert choose("cpu", torch.float32, 0.02).name == "sampled"
    assert close(weight_gradient(left, right, plan), one, torch.float32)
    with pytest.raises(ConfigError, match=r"sampled.*not on cuda"):
        choose("cuda", torch.float32, 0.02)
    monkeypatch.setitem(os.environ, "SHIRA_BACKEND", "triton")
    with pytest.raises(ConfigError, match=r"triton.*float64"):
        choose("cpu", torch.float64, 0.02)
    with pytest.raises(ConfigError, match="Did you mean 'chunked'"), use_backend("chunkd"):
        pass


def test_without_the_kernels_torch_does_it(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "no compiler"))
    choice = choose("cpu", torch.float32, 0.02)
    assert choice.name == "sampled"
    assert "no compiler" in choice.why


@pytest.mark.parametrize("bad", ["0", "-5", "much"])
def test_scratch_memory_is_a_positive_number(monkeypatch, bad):
    with pytest.raises(ConfigError, match="positive"):
        set_scratch_bytes(0)
    monkeypatch.setitem(os.environ, "SHIRA_SCRATCH_BYTES", bad)
    with pytest.raises(ConfigError, match=bad):
        scratch_bytes()
