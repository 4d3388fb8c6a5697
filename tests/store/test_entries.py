# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from shira.store.entries import EntryError, check_values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    """Wherever it is: what looks for it works on many values at a time."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_values(values)
    for at in range(200):
        spoilt = values.clone()
        spoilt[at] = bad
        counts = "1 NaN and 0 infinite" if math.isnan(bad) else "0 NaN and 1 infinite"
        with pytest.raises(EntryError, match=f"{counts} of 200"):
            check_values(spoilt)


def test_no_values() -> None:
    check_values(torch.empty(0))
    check_values(torch.tensor([torch.finfo(torch.float32).max]))
