# SPDX-License-Identifier: Apache-2.0
"""What a training step holds beyond the frozen model's: counted, allocation by allocation."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from benchmarks import contenders, memory
from shira import ShiraConfig, get_peft_model
from shira.ops import native, use_backend

WORK = contenders.Workload(
    layers=1, hidden=512, intermediate=1408, heads=4, vocab=64, batch=1, tokens=64, density=0.005
)


def peak(name, work):
    """Of the second step; the first makes plans and the optimizer's state."""
    contender = contenders.build(name, contenders.base_model(work), work)
    inputs = contenders.batch(work)

    def step():
        contender.forward(inputs).backward()
        contender.update()
        inputs["inputs_embeds"].grad = None

    step()
    return memory.allocator_peak(step)


def bound(work):
    """Saved inputs, a multiple of k, and the kernels' scratch."""
    # q, k, v share their input, and so do gate and up; o and down have their own
    inputs = 4 * work.tokens * (3 * work.hidden + work.intermediate)
    # the gradients, and what is in flight for one layer: originals, sums
    k, largest = work.trained_entries, work.rank * (work.hidden + work.intermediate)
    scratch_of = native.load().library._call["entries_scratch"]
    scratch = max(scratch_of(work.tokens, cols, largest, 1) for cols in (512, 1408))
    return inputs + 4 * (k + 2 * largest) + scratch


@pytest.fixture(autouse=True)
def one_thread():
    if native.load().library is None:
        pytest.skip(native.load().why)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["shira", "shira-block"])
@pytest.mark.parametrize("tokens", [64, 128])
def test_a_step_holds_the_saved_inputs_and_a_multiple_of_k(name, tokens):
    work = replace(WORK, tokens=tokens)
    assert peak(name, work) - peak("floor", work) <= bound(work)


def test_a_dense_gradient_would_be_seen():
    with use_backend("chunked"):
        assert peak("shira", WORK) - peak("floor", WORK) > bound(WORK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and through torch
def test_an_unmerge_lets_go_of_the_originals_at_once(dtype):
    base = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(dtype)
    model = get_peft_model(base, ShiraConfig(r=1, target_modules=["0"], init_weights=False))
    gc.collect()
    gc.disable()  # a circle would keep them, and be found some time later
    try:
        model.merge_adapter()
        originals = weakref.ref(base[0]._undo.originals)
        model.unmerge_adapter()
        assert originals() is None
    finally:
        gc.enable()
