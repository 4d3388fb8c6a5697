# SPDX-License-Identifier: Apache-2.0
"""Boxes against what a copy between two views really does, over drawn views."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.checkpoints.boxes import boxes_between


@st.composite
def views(draw, shape):
    """A chain of views of a tensor of this shape, as functions to apply to any such tensor."""
    steps, tensor = [], torch.empty(shape, device="meta")
    for _ in range(draw(st.integers(0, 5))):
        dims = tensor.dim()
        kind = draw(st.sampled_from(["narrow", "transpose", "step", "split", "flatten"]))
        if kind == "transpose":
            a, b = draw(st.integers(0, dims - 1)), draw(st.integers(0, dims - 1))
            step = lambda t, a=a, b=b: t.transpose(a, b)  # noqa: E731
        elif kind == "flatten":
            step = lambda t: t.flatten() if t.is_contiguous() else t  # noqa: E731
        else:
            dim = draw(st.integers(0, dims - 1))
            size = tensor.shape[dim]
            if kind == "narrow":
                length = draw(st.integers(1, size))
                start = draw(st.integers(0, size - length))
                step = lambda t, d=dim, s=start, n=length: t.narrow(d, s, n)  # noqa: E731
            elif kind == "step":
                every = draw(st.integers(1, 3))
                cut = (slice(None),) * dim + (slice(None, None, every),)
                step = lambda t, cut=cut: t[cut]  # noqa: E731
            else:
                parts = draw(st.sampled_from([n for n in (1, 2, 3) if size % n == 0]))
                step = lambda t, d=dim, n=parts: t.unflatten(d, (n, -1))  # noqa: E731
        steps.append(step)
        tensor = step(tensor)
    return steps


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_boxes_say_what_a_copy_does(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    steps = data.draw(views(shape))
    probe = torch.empty(shape, device="meta")
    source = torch.arange(probe.numel(), dtype=torch.float64).reshape(shape)
    for step in steps:
        probe, source = step(probe), step(source)
    # the target: a permuted, padded part of a larger storage
    order = data.draw(st.permutations(range(probe.dim())))
    pad = data.draw(st.integers(0, 2))
    room = torch.full([probe.shape[d] + pad for d in order], -1.0, dtype=torch.float64)
    target = room[tuple(slice(pad, None) for _ in order)]
    target = target.permute([order.index(d) for d in range(probe.dim())])
    target.copy_(source)
    found = torch.full((room.numel(),), -1.0, dtype=torch.float64)
    indices = torch.arange(torch.Size(shape).numel(), dtype=torch.int32)
    count = 0
    for box in boxes_between(probe, target):
        entries, positions = box.locate(indices)
        found[positions] = entries.double()
        count += entries.numel()
    assert torch.equal(found.view(room.shape), room)
    assert count == source.numel()


def test_an_empty_view_and_no_indices():
    assert boxes_between(torch.empty(0, 3, device="meta"), torch.empty(0, 3)) == []
    (box,) = boxes_between(torch.empty(4, 3, device="meta"), torch.empty(4, 3))
    entries, positions = box.locate(torch.empty(0, dtype=torch.int32))
    assert entries.numel() == positions.numel() == 0


def test_what_runs_on_is_one_dimension():
    (box,) = boxes_between(torch.empty(4, 3, 5, device="meta"), torch.empty(4, 3, 5))
    assert box.dims == ((60, 1, 1),)


def test_a_target_that_overlaps_is_refused():
    with pytest.raises(ValueError, match="overlap"):
        boxes_between(torch.empty(4, 3), torch.empty(1, 3).expand(4, 3))
