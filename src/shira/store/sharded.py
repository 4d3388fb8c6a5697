# SPDX-License-Identifier: Apache-2.0
"""Tensors of which each process holds a part: FSDP2's ``DTensor``, DeepSpeed ZeRO-3's parameters.

Nothing here imports DeepSpeed unless a parameter is one of its own. To make a tensor whole is a
collective call: every process has to make it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 keeps this parameter, be it gathered just now or not."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    if is_partitioned(tensor):
        return str(tensor.ds_status.name) != "AVAILABLE"  # type: ignore[attr-defined]
    return hasattr(tensor, "full_tensor")


@contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While the context lasts, ZeRO-3's parameters are whole, to be read."""
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor) and is_sharded(tensor)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached; inside `gathered` if ZeRO-3 keeps it."""
    tensor = tensor.detach()
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
