# SPDX-License-Identifier: Apache-2.0
"""Operands for the tests of ops, and the kernels for each instruction set."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shira.ops import native
from shira.ops.native import build as building
from shira.support import Support

from . import reference

needs_kernels = pytest.mark.skipif(native.load().library is None, reason=native.load().why)


def random_indices(shape: Sequence[int], k: int, seed: int = 0) -> Tensor:
    """int32 (2, k) coordinates of k distinct entries."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(math.prod(shape), generator=generator)[:k]
    return Support.from_unsorted(shape, flat).coordinates()


def values(k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Relative to the size of the whole, as the error of a sum of products of numbers near 1 is."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}.get(dtype, 5e-3)
    wide_a, wide_b = a.double(), b.double()
    floor = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 1e-30)  # terms that cancel
    return bool((wide_a - wide_b).norm() <= tolerance * wide_b.norm() + floor)


def operands(tokens, rows, cols, dtype, strided=False):
    left = torch.randn(rows, tokens).t() if strided else torch.randn(tokens, rows)
    return left.to(dtype), torch.randn(tokens, cols).to(dtype)


def dense(left, right, indices):
    flat = (indices[0].long() * right.shape[1] + indices[1].long()).to(left.device)
    return reference.weight_gradient(left, right, flat)


def batch(shape, counts, density, dtype, kind, transposed=False, extra=3):
    """A mixed batch, rows in random order: what `ops.add_products` takes; ``extra`` of no group."""
    fan_in, fan_out = shape if transposed else shape[::-1]
    tokens = sum(counts) + extra
    k = round(shape[0] * shape[1] * density)
    return (
        torch.randn(tokens, fan_out).to(dtype),
        torch.randn(tokens, fan_in).to(dtype),
        torch.randperm(tokens)[: sum(counts)],
        counts,
        [torch.randn(k).to(kind) for _ in counts],
        [random_indices(shape, k, seed=i) for i in range(len(counts))],
        shape,
    )


def check_against_the_reference(case, got, transposed, roundings=1):
    """Within the rounding of the sum and one of the result; rows of no group bit for bit."""
    result, x, rows, counts, deltas, indices, shape = case
    sums, size = result.double(), result.double().abs()
    for at, delta, index in zip(rows.split(counts), deltas, indices, strict=True):
        args = index, shape, transposed
        sums[at] += reference.sparse_product(x[at].double(), delta.double(), *args)
        size[at] += reference.sparse_product(x[at].double().abs(), delta.double().abs(), *args)
    unit = roundings * torch.finfo(result.dtype).eps / 2
    assert ((got.double() - sums).abs() <= unit * sums.abs() + 64 * 2**-24 * size + 1e-7).all()
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(got[rest], result[rest])


def supported():
    best = native.load().library.instruction_set
    order = ["base", "avx2", "avx512"]
    return order[: order.index(best) + 1]


@cache
def kernels_of(instruction_set):
    """The kernels for an instruction set; AVX-512's with vectors made of AVX2's if need be."""
    if instruction_set in supported():
        return native.kernels_for(instruction_set)
    if "avx2" not in supported():
        pytest.skip(f"this CPU has no {instruction_set}")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "wide.so"
        try:
            building.build(library, {instruction_set: ["-march=x86-64-v3", "-DWIDE"]})
        except building.BuildError as error:
            pytest.skip(str(error))
        return native.Kernels(ctypes.CDLL(str(library)), instruction_set)


def compile_for_gpus(script, folder):
    """Run a script that compiles Triton's kernels, for which no GPU is needed."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TRITON_CACHE_DIR": str(folder),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "compiled", done.stderr


class torch_threads:
    def __init__(self, number):
        self.number = number

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.number)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)
