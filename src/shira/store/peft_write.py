# SPDX-License-Identifier: Apache-2.0
"""Writing PEFT's format, which ``peft_format`` describes and reads.

Stock PEFT casts what it loads to float32 values and int32 indices, so the file may hold bfloat16
and int16 and be half as large. It makes room for r (m + n) values in each weight before it looks at
the file, so it can load an adapter only if each weight has that many for the config's one r.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError
from shira.store.atomic import check_kind, write_atomically
from shira.store.compact_write import stored_whole
from shira.store.entries import EntryError, check_values
from shira.store.names import PEFT_PREFIX
from shira.store.peft_config import CONFIG_NAME, compose_config
from shira.store.peft_format import INDICES, VALUES, WEIGHTS_NAME
from shira.support import matrix_shape

_VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INDEX_DTYPES = (torch.int16, torch.int32, torch.int64)


def write_peft(
    adapter: Adapter,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    indices_dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter in PEFT's format; nothing is written if anything is wrong with it.

    Each of the two files is replaced as a whole, the weights first.

    Args:
        adapter: What to write. Its metadata are the fields of the config.
        path: A folder, made if absent.
        dtype: Dtype of the stored values; ``None`` keeps theirs. Whole tensors keep theirs always.
        config: Fields that go before the metadata's.
        indices_dtype: ``torch.int16``, ``int32`` or ``int64``; ``None`` takes int16 for each weight
            with at most 32768 rows and columns, else int32. PEFT reads any of them.

    Raises:
        ConfigError: If a dtype is not one of the format's, the path is a file, or a field of the
            config cannot be written.
        AdapterError: If a parameter is no module's ``weight``, a value is not finite in ``dtype``,
            a whole tensor has a dtype that models do not keep, or a row or column does not fit
            ``indices_dtype``.
    """
    folder = Path(path)
    check_kind(folder, folder=True)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        check_kind(folder / name)
    _check_choice("dtype", dtype, _VALUE_DTYPES)
    _check_choice("indices_dtype", indices_dtype, _INDEX_DTYPES)
    fields = {**adapter.metadata, **(config or {})}
    text = compose_config(
        {name: delta.support.shape for name, delta in adapter.items()},
        {name: delta.nnz for name, delta in adapter.items()},
        fields,
        list(adapter.tensors),
    )
    tensors: dict[str, Tensor] = {}
    for name, delta in adapter.items():
        key = PEFT_PREFIX + _module_of(name)
        tensors[f"{key}.{VALUES}"] = _stored_values(name, delta, dtype)
        tensors[f"{key}.{INDICES}"] = _stored_indices(name, delta, indices_dtype)
    if fields.get("modules_to_save") and not adapter.tensors:
        warnings.warn(
            f"{folder}: modules_to_save ({', '.join(map(str, fields['modules_to_save']))}) stand "
            "in the adapter's metadata, but it holds no whole tensors, and this file neither",
            stacklevel=2,
        )
    for name, tensor in adapter.tensors.items():
        tensors[PEFT_PREFIX + name] = stored_whole(
            name, tensor
        ).clone()  # safetensors takes no shared memory
    raw = to_bytes(tensors, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_NAME, raw)
    write_atomically(folder / CONFIG_NAME, text.encode())


def _check_choice(what: str, dtype: torch.dtype | None, choices: tuple[torch.dtype, ...]) -> None:
    if dtype is not None and dtype not in choices:
        raise ConfigError(f"{what} is one of {', '.join(map(str, choices))}, not {dtype}")


def _module_of(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if kind != "weight" or not module:
        raise AdapterError(f"PEFT's format names modules, and {name!r} is not the 'weight' of one")
    return module


def _stored_values(name: str, delta: SparseDelta, dtype: torch.dtype | None) -> Tensor:
    if dtype is None and delta.values.dtype not in _VALUE_DTYPES:
        raise AdapterError(
            f"values of {name!r} are {delta.values.dtype}; give dtype= to store them in one of "
            f"{', '.join(map(str, _VALUE_DTYPES))}"
        )
    values = delta.values.detach().to("cpu", dtype or delta.values.dtype, copy=True)
    try:
        check_values(values)
    except EntryError as error:
        hint = "" if dtype is None else f" when stored as {dtype}"
        raise AdapterError(f"{name!r}: {error}{hint}") from error
    return values.contiguous()


def _stored_indices(name: str, delta: SparseDelta, dtype: torch.dtype | None) -> Tensor:
    largest = max(matrix_shape(delta.support.shape))
    if dtype is None:
        dtype = torch.int16 if largest <= 2**15 else torch.int32
    if largest - 1 > torch.iinfo(dtype).max:
        raise AdapterError(
            f"{name!r} of shape {delta.support.shape} has rows or columns beyond {dtype}"
        )
    return delta.support.coordinates().to("cpu", dtype)
