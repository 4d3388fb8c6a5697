# SPDX-License-Identifier: Apache-2.0
"""Adapter folders that nobody should accept, each wrong in one way.

A `Hostile` takes a sound folder (one module ``layer``, weight 8 x 6, four entries) and spoils it.
``HOSTILE`` is the list; the tests of the store, and whoever else reads adapters, run through it.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

KEY = "base_model.model.layer"
VALUES = f"{KEY}.shira_weight"
INDICES = f"{KEY}.shira_indices"
SHAPE = (8, 6)
PARAMETER = "layer.weight"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Hostile(NamedTuple):
    """One way to be wrong.

    Attributes:
        name: Of the test.
        spoil: Changes the sound folder.
        tensor: The tensor that the error names, if one is to blame.
        cause: A word of the cause that the error says.
        file: The file that the error names.
        needs_shapes: Whether only the base's shapes give it away.
    """

    name: str
    spoil: Callable[[Path], None]
    tensor: str | None
    cause: str
    file: str = WEIGHTS
    needs_shapes: bool = False


def sound_tensors() -> dict[str, Tensor]:
    return {
        VALUES: torch.tensor([0.5, -1.0, 2.0, 0.25]),
        INDICES: torch.tensor([[0, 1, 1, 7], [5, 0, 3, 2]], dtype=torch.int32),
    }


def sound_config() -> dict[str, Any]:
    return {"peft_type": "SHIRA", "r": 1, "target_modules": ["layer"]}


def write_sound(folder: Path) -> Path:
    """A folder as stock PEFT writes it, without shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(sound_tensors(), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(sound_config()))
    return folder


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from a header that no library would write."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# --- ways to spoil -----------------------------------------------------------------------------


def _tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    """Other tensors; ``values`` and ``indices`` stand for the two keys, None takes one out."""

    def spoil(folder: Path) -> None:
        tensors = sound_tensors()
        for short, tensor in changes.items():
            key = {"values": VALUES, "indices": INDICES}[short]
            if tensor is None:
                del tensors[key]
            else:
                tensors[key] = tensor
        save_file(tensors, folder / WEIGHTS)

    return spoil


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = {k.replace(old, new): v for k, v in sound_tensors().items()}
        save_file(tensors, folder / WEIGHTS)

    return spoil


def _raw(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(content) and None


def _cut(at: int) -> Callable[[Path], None]:
    """Keep the first ``at`` bytes (or all but the last ``-at``)."""

    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:at])

    return spoil


def _longer(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**sound_config(), **changes}))

    return spoil


def _config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(text) and None


def _sparse_config(folder: Path) -> None:
    """A gigabyte that takes no room on the disk."""
    with open(folder / CONFIG, "r+b") as file:
        file.truncate(10**9)


def _torch_save(folder: Path) -> None:
    torch.save(sound_tensors(), folder / WEIGHTS)


def _other_peft_weights(folder: Path) -> None:
    save_file({f"{KEY}.lora_A.weight": torch.zeros(2, 6)}, folder / WEIGHTS)


def _only_bin(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _same_module_twice(folder: Path) -> None:
    bare = {k.removeprefix("base_model.model."): v.clone() for k, v in sound_tensors().items()}
    save_file({**sound_tensors(), **bare}, folder / WEIGHTS)


def _duplicate_header_key(folder: Path) -> None:
    one = json.dumps(entry("F32", [1], 0, 4))
    text = f'{{"{VALUES}": {one}, "{VALUES}": {one}}}'.encode()
    (folder / WEIGHTS).write_bytes(raw_file(text, bytes(4)))


def _ints(rows: list[int], cols: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([rows, cols], dtype=dtype)


_NAN = torch.tensor([0.5, float("nan"), 2.0, float("nan")])
_INF = torch.tensor([0.5, 1.0, -float("inf"), 2.0])
_PAIR = {VALUES: entry("F32", [2], 0, 8), INDICES: entry("I32", [2, 2], 8, 24)}


HOSTILE: tuple[Hostile, ...] = (
    # Indices
    Hostile("row_out_of_range", _tensors(indices=_ints([0, 1, 1, 8], [5, 0, 3, 2])), INDICES,
            "row 8 is out of range", needs_shapes=True),
    Hostile("column_out_of_range", _tensors(indices=_ints([0, 1, 1, 7], [6, 0, 3, 2])), INDICES,
            "column 6 is out of range", needs_shapes=True),
    Hostile("negative_row", _tensors(indices=_ints([0, 1, -1, 7], [5, 0, 3, 2])), INDICES,
            "-1 is negative"),
    Hostile("duplicate_sorted", _tensors(indices=_ints([0, 1, 1, 7], [5, 3, 3, 2])), INDICES,
            "row 1, column 3 occurs more than once"),
    Hostile("duplicate_unsorted", _tensors(indices=_ints([7, 0, 1, 7], [2, 5, 3, 2])), INDICES,
            "duplicate"),
    Hostile("int64_overflows_int32",
            _tensors(indices=_ints([0, 1, 1, 2**32 + 7], [5, 0, 3, 2], torch.int64)), INDICES,
            "overflows"),
    Hostile("uint64_overflows_int64", lambda folder: _tensors(
        indices=_ints([0, 1, 1, -1], [5, 0, 3, 2], torch.int64).view(torch.uint64))(folder),
            INDICES, "18446744073709551615 overflows"),
    Hostile("float_indices_not_whole",
            _tensors(indices=torch.tensor([[0, 1, 1, 7], [5, 0.5, 3, 2]])), INDICES,
            "no whole number"),
    Hostile("float_indices_nan",
            _tensors(indices=torch.tensor([[0, 1, 1, 7], [5, float("nan"), 3, 2]])), INDICES,
            "no whole number"),
    Hostile("float_indices_inexact",
            _tensors(indices=torch.tensor([[0, 1, 1, 2.0**25], [5, 0, 3, 2]])), INDICES,
            "no whole number below"),
    Hostile("boolean_indices", _tensors(indices=torch.ones(2, 4, dtype=torch.bool)), INDICES,
            "dtype BOOL"),
    Hostile("float64_indices", _tensors(indices=torch.ones(2, 4, dtype=torch.float64)), INDICES,
            "dtype F64"),
    # Shapes and counts
    Hostile("indices_transposed", _tensors(indices=torch.zeros(4, 2, dtype=torch.int32)), INDICES,
            "(2, 4)"),
    Hostile("indices_flat", _tensors(indices=torch.zeros(8, dtype=torch.int32)), INDICES, "shape"),
    Hostile("fewer_indices", _tensors(indices=_ints([0, 1, 1], [5, 0, 3])), INDICES, "4 values"),
    Hostile("values_two_dimensional", _tensors(values=torch.zeros(2, 2)), VALUES, "shape"),
    Hostile("values_scalar", _tensors(values=torch.tensor(1.0)), VALUES, "shape"),
    # Values
    Hostile("nan", _tensors(values=_NAN), VALUES, "2 NaN and 0 infinite of 4"),
    Hostile("infinity_bf16", _tensors(values=_INF.bfloat16()), VALUES, "1 infinite"),
    Hostile("infinity_f64", _tensors(values=_INF.double()), VALUES, "1 infinite"),
    Hostile("integer_values", _tensors(values=torch.ones(4, dtype=torch.int32)), VALUES,
            "dtype I32"),
    Hostile("float8_values", _tensors(values=torch.ones(4).to(torch.float8_e4m3fn)), VALUES,
            "dtype F8_E4M3"),
    Hostile("complex_values", _tensors(values=torch.ones(4, dtype=torch.complex64)), VALUES,
            "dtype C64"),
    # Names
    Hostile("no_indices", _tensors(indices=None), VALUES, "missing"),
    Hostile("no_values", _tensors(values=None), INDICES, "missing"),
    Hostile("unknown_target", _renamed("layer", "layr"), f"{KEY[:-5]}layr.shira_weight",
            "Did you mean 'layer.weight'", needs_shapes=True),
    Hostile("empty_module_name", _renamed(".layer", ""), None, "empty module name"),
    Hostile("half_empty_module_name", _renamed("layer", "a..b"), None, "empty module name"),
    Hostile("same_module_twice", _same_module_twice, None, "duplicate"),
    Hostile("no_shira_tensors", _other_peft_weights, None, "not a SHiRA adapter"),
    # The safetensors file
    Hostile("empty_file", _raw(b""), None, "truncated"),
    Hostile("cut_in_length", _cut(5), None, "truncated"),
    Hostile("cut_in_header", _cut(40), None, "truncated"),
    Hostile("cut_in_data", _cut(-3), None, "truncated"),
    Hostile("cut_all_data", _cut(-48), None, "truncated"),
    Hostile("trailing_bytes", _longer, None, "8 bytes follow the last tensor"),
    Hostile("pickle", _raw(pickle.dumps({"layer": [1.0]}, protocol=4)), None, "pickle"),
    Hostile("pickle_in_zip", _torch_save, None, "pickle"),
    Hostile("only_a_bin", _only_bin, None, "pickle"),
    Hostile("git_lfs_pointer", _raw(b"version https://git-lfs.github.com/spec/v1\n"), None, "lfs"),
    Hostile("header_of_2_to_60", _raw(raw_file({}, length=2**60)), None, "too large"),
    Hostile("header_longer_than_file", _raw(raw_file({}, length=10_000)), None, "truncated"),
    Hostile("header_no_json", _raw(raw_file(b"{nonsense}")), None, "not valid JSON"),
    Hostile("header_no_utf8", _raw(raw_file(b'{"\xff": 1}')), None, "not valid JSON"),
    Hostile("header_a_list", _raw(raw_file([1, 2])), None, "not safetensors"),
    Hostile("header_nested", _raw(raw_file(b'{"a":' + b"[" * 100_000)), None, "nested"),
    Hostile("header_huge_number", _raw(raw_file(b'{"a":' + b"9" * 50_000 + b"}")), None, "JSON"),
    Hostile("header_repeats_a_key", _duplicate_header_key, VALUES, "duplicate key"),
    Hostile("metadata_not_text", _raw(raw_file({"__metadata__": {"a": 1}})), None, "__metadata__"),
    Hostile("claims_10_to_12_elements", _raw(raw_file(
        {VALUES: entry("F32", [10**12], 0, 4 * 10**12),
         INDICES: entry("I32", [2, 10**12], 4 * 10**12, 12 * 10**12)})), VALUES, "truncated"),
    Hostile("claims_more_than_it_has", _raw(raw_file(
        {**_PAIR, VALUES: entry("F32", [10**12], 0, 8)}, bytes(24))), VALUES, "size"),
    Hostile("sizes_multiply_past_64_bits", _raw(raw_file(
        {**_PAIR, VALUES: entry("F32", [2**62, 2**62, 2], 0, 8)}, bytes(24))), VALUES, "size"),
    Hostile("negative_size", _raw(raw_file(
        {**_PAIR, VALUES: entry("F32", [-2], 0, 8)}, bytes(24))), VALUES, "negative"),
    Hostile("fractional_size", _raw(raw_file(
        {**_PAIR, VALUES: entry("F32", [2.0], 0, 8)}, bytes(24))), VALUES, "integers"),
    Hostile("unknown_dtype", _raw(raw_file(
        {**_PAIR, VALUES: entry("f32", [2], 0, 8)}, bytes(24))), VALUES, "unknown dtype"),
    Hostile("dtype_not_text", _raw(raw_file(
        {**_PAIR, VALUES: entry(["F32"], [2], 0, 8)}, bytes(24))),  # type: ignore[arg-type]
            VALUES, "unknown dtype"),
    Hostile("overlapping_tensors", _raw(raw_file(
        {**_PAIR, INDICES: entry("I32", [2, 2], 4, 20)}, bytes(20))), INDICES, "overlap"),
    Hostile("same_bytes_twice", _raw(raw_file(
        {**_PAIR, "other": entry("F32", [2], 0, 8)}, bytes(24))), None, "overlap"),
    Hostile("gap_between_tensors", _raw(raw_file(
        {**_PAIR, INDICES: entry("I32", [2, 2], 16, 32)}, bytes(32))), INDICES, "gap"),
    Hostile("offsets_reversed", _raw(raw_file(
        {**_PAIR, VALUES: entry("F32", [2], 8, 0)}, bytes(24))), VALUES, "no range"),
    Hostile("offsets_negative", _raw(raw_file(
        {**_PAIR, VALUES: entry("F32", [2], -8, 0)}, bytes(24))), VALUES, "no range"),
    Hostile("offsets_missing", _raw(raw_file(
        {**_PAIR, VALUES: {"dtype": "F32", "shape": [2]}}, bytes(24))), VALUES, "data_offsets"),
    Hostile("tensor_not_an_object", _raw(raw_file({**_PAIR, VALUES: 7}, bytes(24))), VALUES,
            "data_offsets"),
    # The config
    Hostile("config_of_lora", _config(peft_type="LORA"), None, "shira convert", CONFIG),
    Hostile("config_without_type", _config(peft_type=None), None, "peft_type", CONFIG),
    Hostile("config_no_json", _config_text("{'peft_type': 'SHIRA'}"), None, "JSON", CONFIG),
    Hostile("config_a_list", _config_text("[]"), None, "object", CONFIG),
    Hostile("config_with_nan", _config_text('{"peft_type": "SHIRA", "a": NaN}'), None, "NaN",
            CONFIG),
    Hostile("config_too_large", _sparse_config, None, "too large", CONFIG),
    Hostile("config_missing", lambda folder: (folder / CONFIG).unlink(), None, CONFIG, CONFIG),
    Hostile("weights_missing", lambda folder: (folder / WEIGHTS).unlink(), None, WEIGHTS, WEIGHTS),
    Hostile("shapes_too_small", _config(shira_shapes={PARAMETER: [4, 6]}), INDICES,
            "row 7 is out of range", needs_shapes=True),
    Hostile("shapes_no_mapping", _config(shira_shapes=[8, 6]), None, "shira_shapes", CONFIG),
    Hostile("shapes_negative", _config(shira_shapes={PARAMETER: [-8, -6]}), None, PARAMETER,
            CONFIG),
    Hostile("shapes_fractional", _config(shira_shapes={PARAMETER: [8.0, 6]}), None, PARAMETER,
            CONFIG),
    Hostile("shapes_overflow", _config(shira_shapes={PARAMETER: [8, 2**20, 2**20]}), None,
            "overflows", CONFIG),
    Hostile("shapes_list_a_missing_target",
            _config(shira_shapes={PARAMETER: [8, 6], "gone.weight": [8, 6]}), None,
            "missing tensor"),
    Hostile("shapes_lack_a_target", _config(shira_shapes={}), VALUES, "unknown target"),
    Hostile("tied_no_mapping", _config(tied_weights=["x"]), None, "tied_weights", CONFIG),
    Hostile("tied_to_no_name", _config(tied_weights={"head.weight": [1]}), None,
            "tied_weights", CONFIG),
    Hostile("tied_to_nothing", _config(tied_weights={"head.weight": "absent.weight"}), None,
            "tied_weights", "no entries of it"),
    Hostile("tied_to_itself", _config(tied_weights={PARAMETER: PARAMETER}), None,
            "tied_weights", "both"),
    Hostile("fingerprint_no_mapping", _config(base_fingerprint="float32:00"), None,
            "base_fingerprint", CONFIG),
    Hostile("fingerprint_malformed", _config(base_fingerprint={PARAMETER: "float32:xyz"}), None,
            PARAMETER, CONFIG),
    Hostile("rounded_fingerprints_malformed", _config(base_fingerprint_rounded={PARAMETER: [{}]}),
            None, PARAMETER, CONFIG),
    Hostile("rounded_fingerprints_no_mapping", _config(base_fingerprint_rounded=[]), None,
            "base_fingerprint_rounded", CONFIG),
)  # fmt: skip
