# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels that overwrite entries, and how the library is built and found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import ops
from shira.base import replacement
from shira.ops import make_plan, native
from shira.ops.native import build as building

from .cases import needs_kernels, random_indices, supported

NO_COMPILER = "there is no C compiler (cc, gcc or clang; CC names another)"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(tensor):
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


@needs_kernels
@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512"])
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    share=st.sampled_from([0.0, 0.02, 1.0]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-9, 1e-3, 1.0, 1e6]),
)
def test_enter_writes_the_replacements_and_leave_the_originals(
    instruction_set, rows, cols, share, dtype, size
):
    if instruction_set not in supported():
        pytest.skip(f"this CPU has no {instruction_set}")
    kernels = native.kernels_for(instruction_set)
    indices = random_indices((rows, cols), round(rows * cols * share))
    plan = make_plan([indices], (rows, cols), (cols, 1))
    weight = torch.randn(rows, cols).to(dtype)
    before, delta = weight.clone(), torch.randn(plan.nnz) * size
    want = weight.clone()
    want.view(-1)[plan.flat()] = replacement(want.view(-1)[plan.flat()], delta)
    write = native.DeltaWrite(kernels, weight, plan.gaps, delta)
    write.put_back()  # nothing is there to be put back yet
    assert torch.equal(bits(weight), bits(before))
    write.put_in()
    assert torch.equal(bits(weight), bits(want))
    assert torch.equal(bits(write.originals), bits(before.view(-1)[plan.flat()]))
    native.DeltaWrite(kernels, weight, plan.gaps, delta, write.originals).put_back()
    assert torch.equal(bits(weight), bits(before))
    write.put_in()
    write.put_back()
    assert torch.equal(bits(weight), bits(before))
    weight.fill_(3.0)
    write.put_back()  # it has been put back already
    assert (weight == 3.0).all()


@needs_kernels
def test_what_was_put_in_is_taken_out_where_the_weight_was_moved_meanwhile():
    plan = make_plan([random_indices((4, 4), 5)], (4, 4), (4, 1))
    weight = torch.zeros(4, 4)
    write = native.DeltaWrite(native.load().library, weight, plan.gaps, torch.ones(5))
    write.put_in()
    weight.share_memory_()
    write.put_back()
    assert not weight.any()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_no_numbers_come_through(dtype):
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 6e-8, 3.4e38])
    weight = torch.zeros(1, 6).to(dtype)
    plan = make_plan([torch.stack((torch.zeros(6), torch.arange(6))).int()], (1, 6), (6, 1))
    native.DeltaWrite(native.load().library, weight, plan.gaps, odd).put_in()
    want = replacement(torch.zeros(6).to(dtype), odd)
    assert torch.equal(weight[0].isnan(), want.isnan())
    assert torch.equal(weight[0].nan_to_num(), want.nan_to_num())


@needs_kernels
def test_a_product_with_and_without_the_kernels_has_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    weight, x = torch.randn(33, 47).bfloat16(), torch.randn(5, 47).bfloat16()
    v, i = torch.randn(100), random_indices((33, 47), 100)
    with_kernels = ops.linear(x, weight, None, [v], [i])
    monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "none"))
    assert torch.equal(with_kernels, ops.linear(x, weight, None, [v], [i]))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_do_not_depend_on_torchs_default_dtype_and_device(dtype):
    kernels = native.load().library
    indices = random_indices((60, 50), 900)
    plan = make_plan([indices], (60, 50), (50, 1))
    left, right = torch.randn(8, 60), torch.randn(8, 50)
    weight, delta = torch.randn(60, 50), torch.randn(plan.nnz)
    before, keys = weight.clone(), torch.arange(4, device="cpu")
    want = kernels.entries(left, right, *plan.compressed())
    points = kernels.permute(0, 500, 900, (30, 30), keys)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = kernels.entries(left, right, *plan.compressed())
            again = kernels.permute(0, 500, 900, (30, 30), keys)
            write = native.DeltaWrite(kernels, weight, plan.gaps, delta)
            write.put_in()
            write.put_back()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, want)
    assert torch.equal(again, points)
    assert torch.equal(weight, before)


@needs_kernels
def test_one_pool_of_threads():
    code = (
        "import torch; from shira.ops import native; native.load();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1, "the kernels brought an OpenMP of their own"


def test_no_compiler_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(building.BuildError, match="no C compiler"):
        building.build(tmp_path / "x.so")
    assert not list(tmp_path.iterdir())


def test_the_command_that_builds_says_in_a_line_what_is_missing(tmp_path):
    assert native.LIBRARY == building.LIBRARY
    command = [sys.executable, "-m", "shira.ops.native.build"]
    environment = {**os.environ, "PATH": str(tmp_path), "CC": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: " + NO_COMPILER]


def test_a_missing_or_foreign_library_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    loaded = native.load.__wrapped__()
    assert loaded.library is None
    assert "no C compiler" in loaded.why
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    assert "do not load" in native.load.__wrapped__().why
