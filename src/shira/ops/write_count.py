# SPDX-License-Identifier: Apache-2.0
"""Telling autograd of writes that go around it, and of their being undone.

A graph from before a write, whose backward would multiply with the changed weight, then raises
torch's own error instead of giving a wrong gradient. Once the weight has the bits of before again,
and nobody else wrote to it, the count is taken back and that graph may run backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WriteCount(NamedTuple):
    """Writes to a weight since it last was the base."""

    before: int | None
    """Autograd's counter then; None for inference tensors, which have none."""
    writes: int


def count_write(weight: Tensor, earlier: WriteCount | None = None) -> WriteCount:
    """Count one write to a weight, after ``earlier`` ones since it was the base."""
    if weight.is_inference():
        return WriteCount(None, 0)
    if earlier is None or earlier.before is None:
        earlier = WriteCount(weight._version, 0)
    torch.autograd.graph.increment_version(weight)
    return WriteCount(earlier.before, earlier.writes + 1)


def one_write(weight: Tensor) -> WriteCount:
    """Return the count of one write before it is made, to take it back after an interrupt."""
    return WriteCount(None if weight.is_inference() else weight._version, 1)


def take_back(weight: Tensor, count: WriteCount) -> None:
    """Take counted writes back, once the weight holds the bits of before them again."""
    if count.before is None or weight.is_inference():
        return
    if weight._version == count.before:  # taken back already, or never counted
        return
    if weight._version == count.before + count.writes:
        torch._C._autograd._unsafe_set_version_counter((weight,), (count.before,))
    else:  # somebody else wrote too, or this is another tensor: putting back is a write like others
        torch.autograd.graph.increment_version(weight)
