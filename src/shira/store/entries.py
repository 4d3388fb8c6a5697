# SPDX-License-Identifier: Apache-2.0
"""Values and coordinates of one weight as they came from elsewhere: checked and put in order.

Everything that can be known of them without the shape of the weight is checked here; each cause is
an `EntryError`, to which the reader adds the file and the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

COORDINATE_LIMIT = 2**31
"""Rows and columns are below this: PEFT keeps them as int32."""

_EXACT_FLOAT32 = 2**24


class EntryError(ValueError):
    """Entries that no adapter can have; ``tensor`` says whether values or indices are at fault."""

    def __init__(self, tensor: str, cause: str) -> None:
        super().__init__(cause)
        self.tensor = tensor


def check_values(values: Tensor) -> None:
    """Refuse values that are not finite.

    Raises:
        EntryError: If there are NaN or infinite ones.
    """
    if not values.numel() or all(math.isfinite(float(end)) for end in values.aminmax()):
        return  # NaN is the least and the largest of values among which it is
    nan = int(values.isnan().sum())
    infinite = int(values.isinf().sum())
    if nan or infinite:
        raise EntryError(
            "shira_weight",
            f"the values are not finite: {nan} NaN and {infinite} infinite of {values.numel()}",
        )


WHOLE_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Dtypes of whole tensors, in safetensors' words; the integers are those of buffers."""


def check_whole(name: str, tensor: Tensor) -> None:
    """Refuse a whole tensor that no file can hold.

    Raises:
        EntryError: If its dtype is not one of `WHOLE_DTYPES`, or a value is not finite.
    """
    if tensor.dtype not in WHOLE_DTYPES.values():
        raise EntryError(name, f"a whole tensor of {tensor.dtype} cannot be stored")
    if tensor.is_floating_point():
        check_values(tensor)


def check_coordinates(coordinates: Tensor) -> Tensor:
    """The coordinates as int32, where they are whole, not negative and within int32.

    Args:
        coordinates: ``(2, k)`` of an integer dtype, or float32 with whole numbers, which PEFT
            writes on Windows.

    Raises:
        EntryError: If they are not.
    """
    if not coordinates.numel():
        return coordinates.to(torch.int32)
    if coordinates.is_floating_point():
        inexact = (coordinates != coordinates.trunc()) | ~(coordinates.abs() < _EXACT_FLOAT32)
        if bool(inexact.any()):
            bad = coordinates[inexact][0].item()
            raise EntryError("shira_indices", f"index {bad} is no whole number below 2^24")
    if coordinates.dtype == torch.uint64:  # as int64 the largest wrap
        coordinates = coordinates.view(torch.int64)
        if (least := int(coordinates.min())) < 0:
            raise EntryError("shira_indices", f"index {least + 2**64} overflows int32")
    elif coordinates.dtype in (torch.uint16, torch.uint32):  # torch compares none of these
        coordinates = coordinates.to(torch.int64)
    least, most = int(coordinates.min()), int(coordinates.max())
    if least < 0:
        raise EntryError("shira_indices", f"index {least} is negative")
    if most >= COORDINATE_LIMIT:
        raise EntryError("shira_indices", f"index {most} overflows int32")
    return coordinates.to(torch.int32)


def sort_entries(coordinates: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in row-major order, and the values along with them.

    Args:
        coordinates: int32 ``(2, k)``, none negative.
        values: ``(k,)``.

    Returns:
        Coordinates ``(2, k)`` and values ``(k,)``.

    Raises:
        EntryError: If a coordinate occurs twice.
    """
    key = coordinates[0].to(torch.int64).mul_(COORDINATE_LIMIT).add_(coordinates[1])
    if bool((key[1:] > key[:-1]).all()):
        return coordinates, values
    key, order = key.sort()
    twice = key[1:] == key[:-1]
    if bool(twice.any()):
        first = int(key[1:][twice][0])
        raise EntryError(
            "shira_indices",
            f"duplicate indices: row {first // COORDINATE_LIMIT}, column "
            f"{first % COORDINATE_LIMIT} occurs more than once "
            f"({int(twice.sum())} of {key.numel()} entries are repeats)",
        )
    return coordinates[:, order], values[order]
