# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shira.errors import MaskError
from shira.masks import budget, budget_from_density


def test_counts_as_lora_does():
    assert budget(4096, 11008, 32) == 483328
    assert budget(2, 2, 1) == 4  # just fits


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 200))
def test_too_large_a_rank_names_the_largest_that_fits(m, n, r):
    if r * (m + n) <= m * n:
        assert budget(m, n, r) == r * (m + n)
        return
    with pytest.raises(MaskError) as caught:
        budget(m, n, r, name="layers.0.w")
    message = str(caught.value)
    assert message.startswith(f"layers.0.w: r={r} asks for r * (m + n) = {r * (m + n)} entries")
    most = max((q for q in range(1, r) if q * (m + n) <= m * n), default=0)
    if m + n == 0:
        return
    if most:
        assert message.endswith(f"the largest r that fits is {most}")
        assert budget(m, n, most) <= m * n
    else:
        assert message.endswith("no r fits; give a density instead")


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_is_positive(r):
    with pytest.raises(MaskError, match=f"w: r is at least 1, not {r}"):
        budget(4, 4, r, name="w")


@settings(deadline=None)
@given(st.integers(0, 10**9), st.floats(0, 1))
def test_density(numel, density):
    k = budget_from_density(numel, density)
    assert 0 <= k <= numel
    assert (k == 0) == (numel == 0 or density == 0)
    assume(k > 1)
    assert abs(k - numel * density) <= 0.5 + 1e-6


def test_density_by_hand():
    assert budget_from_density(1000, 0.0126) == 13
    assert budget_from_density(1000, 1e-9) == 1
    assert budget_from_density(7, 1.0) == 7


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, math.inf])
def test_a_density_is_a_share(density):
    with pytest.raises(MaskError, match="w: density is a share, from 0 to 1"):
        budget_from_density(10, density, name="w")
