# SPDX-License-Identifier: Apache-2.0
"""`add_products` by the Triton kernel against the dense reference, as ``gradient/test_triton.py``.

``make test-triton`` installs Triton and runs these; without it they are skipped.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import ops

from .cases import batch, check_against_the_reference, compile_for_gpus

pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
from shira.ops import mixed_batch, mixed_batch_triton, native

KINDS = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_triton(case, transposed, calls=1):
    """`ops.add_products`, which has called the kernel so often."""
    result, x, rows, counts, deltas, indices, shape = case
    there = [each.to(DEVICE) for each in (result.clone(), x, rows)]
    lists = [[each.to(DEVICE) for each in some] for some in (deltas, indices)]
    launch = mixed_batch_triton.add_products
    with (
        mock.patch.object(native, "load", return_value=native.Loaded(None, "Triton is tested")),
        mock.patch.object(mixed_batch_triton, "add_products", side_effect=launch) as called,
        ops.use_backend("triton"),
    ):
        got = ops.add_products(*there, counts, *lists, shape, transposed=transposed)
    assert called.call_count == calls
    assert got.data_ptr() == there[0].data_ptr()
    return got.cpu()


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_equals_the_reference(data):
    shape = data.draw(st.sampled_from([(1, 50), (40, 3), (17, 100), (33, 40)]))
    counts = data.draw(st.sampled_from([[1], [2, 5, 0, 1], [9, 17], [1, 1, 1, 1]]))
    density = data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    dtype, kind = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(KINDS))
    transposed = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    case = batch(shape, counts, density, dtype, kind, transposed)
    # the interpreter cuts bfloat16 off where a GPU rounds
    check_against_the_reference(
        case, by_triton(case, transposed), transposed, 1 + (DEVICE == "cpu")
    )


def test_operands_within_wider_tensors():
    torch.manual_seed(0)
    result, x, *rest = batch((40, 30), [2, 3], 0.2, torch.float32, torch.float32)
    x = torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    result = torch.cat((result, torch.full_like(result, torch.nan)), dim=1)[:, :40]
    case = (result, x, *rest)
    check_against_the_reference(case, by_triton(case, False), False)


def test_what_the_kernel_cannot_do_is_done_without_it():
    torch.manual_seed(0)
    result, x, rows, counts, deltas, *rest = batch((40, 30), [2, 3], 0.2, *KINDS[:1] * 2)
    mixed = (result, x, rows, counts, [deltas[0], deltas[1].bfloat16()], *rest)
    check_against_the_reference(mixed, by_triton(mixed, False, calls=0), False)
    deltas[0].requires_grad_()
    watched = (result, x, rows, counts, deltas, *rest)
    check_against_the_reference(watched, by_triton(watched, False, calls=0).detach(), False)


def test_positions_that_lie_elsewhere_are_not_read_by_address():
    x, delta, index = torch.ones(1, 2), torch.ones(1), torch.zeros(2, 1, dtype=torch.int32)
    here = [each.to(DEVICE) for each in (x, delta, index)]
    assert mixed_batch._triton_can(here[0], [here[1]], [here[2]])
    assert not mixed_batch._triton_can(here[0], [here[1]], [index.to("meta")])


def test_nobody_and_nothing():
    torch.manual_seed(0)
    for shape, counts in (((40, 30), [0, 0]), ((40, 30), []), ((0, 30), [2])):
        case = batch(shape, counts, 0.2, torch.float32, torch.float32)
        check_against_the_reference(case, by_triton(case, False, calls=bool(counts)), False)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import bfloat16, float32
from shira.ops.mixed_batch_triton import ONE, SEVERAL, _add_entries

names = [parameter.name for parameter in _add_entries.params]
for dtype, values in (("bf16", bfloat16), ("fp32", float32)):
    for tile in (ONE, SEVERAL):
        for ordered in (False, True):
            constants = {"x_feature": 1, "VALUES": values, "ORDERED": ordered,
                         "TOKENS": tile.tokens, "ROWS": tile.rows, "ENTRIES": tile.entries}
            kinds = {"x": f"*{dtype}", "y": f"*{dtype}", "order": "*i64", "tiles": "*i32",
                     "addresses": "*i64"}
            signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
            for capability in (80, 90):
                kernel = triton.compile(
                    ASTSource(_add_entries, signature, constants, {}),
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": tile.warps},
                )
                assert "spill" not in kernel.asm["ptx"]
                assert kernel.metadata.shared <= 48 * 1024, kernel.metadata.shared
print("compiled")
"""


def test_compiles_for_gpus(tmp_path):
    compile_for_gpus(COMPILE, tmp_path)
