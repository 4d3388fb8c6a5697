# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel against the dense product: in Triton's interpreter, or on a GPU.

``make test-triton`` installs Triton and runs these; without it those that need it are skipped.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import MissingDependencyError
from shira.masks import block_support
from shira.ops import make_plan
from shira.ops.gradient.triton import TILE_FLOAT, TILE_HALF, Tile, available, make_tile_lists
from shira.ops.gradient.triton import triton_weight_gradient as kernel

from .. import cases
from ..cases import close, dense, random_indices

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(16, 16, 16, 1)
installed = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not installed, reason="Triton is not installed: make test-triton")
# Where there is a GPU the interpreter is off (see conftest), and the same tests run there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(rows, cols, tokens, dtype, strided=False):
    left, right = cases.operands(tokens, rows, cols, dtype, strided)
    return left.to(DEVICE), right.to(DEVICE)


def plan_of(indices, rows, cols):
    return make_plan([indices.to(DEVICE)], (rows, cols), (cols, 1))


@needs_triton
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    tokens=st.integers(0, 40),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    tile=st.sampled_from([SMALL, Tile(32, 16, 16, 1), Tile(16, 64, 32, 1)]),
)
def test_equals_the_dense_product(rows, cols, tokens, share, dtype, strided, tile):
    indices = random_indices((rows, cols), round(rows * cols * share))
    plan = plan_of(indices, rows, cols)
    left, right = operands(rows, cols, tokens, dtype, strided)
    got = kernel(left, right, plan, torch.float32, tile)
    assert got.dtype == torch.float32
    assert got.shape == (plan.nnz,)
    assert close(got, dense(left, right, indices), torch.float32)
    assert torch.equal(got, kernel(left, right, plan, torch.float32, tile))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_as_they_are_used(dtype):
    indices = random_indices((300, 170), 3000)
    plan = plan_of(indices, 300, 170)
    left, right = operands(300, 170, 100, dtype)
    got = kernel(left, right, plan, torch.float32)
    assert close(got, dense(left, right, indices), torch.float32)


@needs_triton
def test_more_entries_in_a_tile_than_are_written_at_a_time():
    indices = random_indices((64, 64), 64 * 64)
    left, right = operands(64, 64, 8, torch.float32)
    got = kernel(left, right, plan_of(indices, 64, 64), torch.float32)
    assert close(got, dense(left, right, indices), torch.float32)


@needs_triton
def test_columns_of_a_wider_tensor():
    indices = random_indices((20, 30), 100)
    left, right = operands(60, 90, 12, torch.float32)
    left, right = left[:, 5:25], right[:, ::3]
    got = kernel(left, right, plan_of(indices, 20, 30), torch.float32, SMALL)
    assert close(got, dense(left, right, indices), torch.float32)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.sampled_from([SMALL, TILE_FLOAT, TILE_HALF, Tile(256, 256, 16, 1)]),
)
def test_every_entry_is_in_the_list_of_its_tile(rows, cols, share, tile):
    plan = make_plan(
        [random_indices((rows, cols), max(1, round(rows * cols * share)))], (rows, cols), (cols, 1)
    )
    tiles = make_tile_lists(plan, tile)
    counts = tiles.start.diff()
    assert int(counts.min()) > 0  # no tile without entries is computed
    assert tiles.most == int(counts.max())
    assert sorted(tiles.dest.tolist()) == list(range(plan.nnz))
    number = torch.repeat_interleave(counts)
    local = tiles.local.int()
    assert torch.equal(
        tiles.row[number] + local // tile.cols, plan.pattern().row[tiles.dest.long()]
    )
    assert torch.equal(tiles.col[number] + local % tile.cols, plan.pattern().col[tiles.dest.long()])
    assert len(set(zip(tiles.row.tolist(), tiles.col.tolist(), strict=True))) == len(counts)


def test_only_the_tiles_of_chosen_blocks_are_computed():
    support = block_support((1024, 1024), 5 * 64 * 64, seed=0, block_size=64)
    plan = make_plan([support.coordinates()], (1024, 1024), (1024, 1))
    assert make_tile_lists(plan, TILE_FLOAT).row.numel() == 5


def test_it_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert available("cuda", torch.bfloat16) == (
        True,
        "Triton is installed and the operands are on a GPU",
    )
    assert "not on cpu" in available("cpu")[1]
    assert available("cuda", torch.float64)[0] is False
    assert "float64" in available("cuda", torch.float64)[1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available("cpu") == (True, "Triton's interpreter is on (TRITON_INTERPRET): for tests")
    plan = make_plan([random_indices((4, 5), 6)], (4, 5), (5, 1))
    double = torch.zeros(2, 4).double(), torch.zeros(2, 5).double()
    with pytest.raises(ValueError, match="float64"):
        kernel(*double, plan, torch.float64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available("cuda") == (False, "Triton is not installed (pip install triton)")
    with pytest.raises(MissingDependencyError, match="pip install triton"):
        kernel(torch.zeros(2, 4), torch.zeros(2, 5), plan, torch.float32)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shira.ops.gradient.triton import TILE_FLOAT, TILE_HALF
from shira.ops.gradient.triton_kernel import sampled_tile

names = [parameter.name for parameter in sampled_tile.params]
for dtype, tile, mma in (("bf16", TILE_HALF, True), ("fp32", TILE_FLOAT, False)):
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
        constants = {"left_row": 1, "right_col": 1, "TILE_ROWS": tile.rows, "TILE_COLS": tile.cols,
                     "TILE_TOKENS": tile.tokens, "ENTRIES": 512, "PRECISION": "ieee",
                     "WIDEN": False}
        kinds = {"left": f"*{dtype}", "right": f"*{dtype}", "out": "*fp32", "local": "*i16"}
        for name in ("tile_row", "tile_col", "start", "dest"):
            kinds[name] = "*i32"
        signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
        aligned = [n for n in names if signature[n] != "constexpr" and n != "tokens"]
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        kernel = triton.compile(
            ASTSource(sampled_tile, signature, constants, attrs),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps},
        )
        ptx = kernel.asm["ptx"]
        assert (instruction in ptx) == mma, (dtype, capability)
        assert "cp.async" in ptx, (dtype, capability)  # operands arrive while others are multiplied
        assert kernel.metadata.shared <= 99 * 1024, (dtype, capability, kernel.metadata.shared)
print("compiled")
"""


@needs_triton
def test_compiles_for_gpus_with_tensor_cores_and_asynchronous_copies(tmp_path):
    """No GPU is needed to compile for one; 99 KiB is what small GPUs give a block."""
    cases.compile_for_gpus(COMPILE, tmp_path)


@pytest.mark.gpu
@needs_triton
def test_no_dense_gradient_in_memory():
    rows, cols, tokens = 4096, 4096, 64
    indices = random_indices((rows, cols), 1000)
    plan = plan_of(indices, rows, cols)
    left, right = operands(rows, cols, tokens, torch.bfloat16)
    kernel(left, right, plan, torch.float32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = kernel(left, right, plan, torch.float32)
    assert torch.cuda.max_memory_allocated() - before < 2**16
    assert close(got, dense(left, right, indices), torch.float32)
