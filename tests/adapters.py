# SPDX-License-Identifier: Apache-2.0
"""Small adapters: made by hand, and drawn by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from shira import Adapter, SparseDelta, Support
from shira.masks import random_support

few = settings(max_examples=40, deadline=None)

SHAPES = {"one.weight": (3, 5), "two.weight": (4, 4), "conv.weight": (2, 3, 2, 2)}


def delta(shape, values: dict[int, float], dtype=torch.float32) -> SparseDelta:
    """A delta from ``{flat index: value}``."""
    support = Support.from_unsorted(shape, torch.tensor(sorted(values), dtype=torch.int64))
    return SparseDelta(support, torch.tensor([values[i] for i in sorted(values)], dtype=dtype))


def random_delta(shape, k, seed, *, name="w", slot=0, dtype=torch.float32) -> SparseDelta:
    """k entries of a random mask with normal values."""
    support = random_support(shape, k, seed=seed, name=name, slot=slot)
    generator = torch.Generator().manual_seed(1000 * seed + slot)
    return SparseDelta(support, torch.randn(k, generator=generator).to(dtype))


def random_adapter(seed, shapes=None, k=6, **options) -> Adapter:
    """An adapter with a random delta in each weight."""
    shapes = SHAPES if shapes is None else shapes
    return Adapter(
        {name: random_delta(shape, k, seed, name=name, **options) for name, shape in shapes.items()}
    )


finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def deltas(draw, shape, dtype=torch.float32):
    """A delta of a weight: any positions, from none to all; values that tie and vanish too."""
    numel = torch.Size(shape).numel()
    chosen = draw(st.sets(st.integers(0, numel - 1)))
    value = st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0, -1.0]))
    return delta(shape, {i: draw(value) for i in chosen}, dtype)


@st.composite
def adapters(draw, dtype=None):
    """An adapter of some of the weights of `SHAPES`."""
    dtype = draw(dtypes) if dtype is None else dtype
    names = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
    return Adapter({name: draw(deltas(SHAPES[name], dtype)) for name in sorted(names)})
