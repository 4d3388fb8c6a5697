# SPDX-License-Identifier: Apache-2.0
"""Compact files that nobody should accept, each wrong in one way.

A `Hostile` takes the parts of a sound file (three parameters: gaps, blocks with a rest, and a seed
with int8 values) and spoils them; `compose` then makes a file with a *right* checksum of them, so
that the checksum is the cause only where it is meant to be.
"""

from __future__ import annotations

import functools
import json
import pickle
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.masks import random_support
from shira.store import save
from shira.support import Support

NAME = "adapter.safetensors"
GAPS, BLOCKS, SEED = "a.weight", "b.weight", "c.weight"
SHAPES = {GAPS: (8, 6), BLOCKS: (16, 12), SEED: (8, 10)}


class Parts(NamedTuple):
    """A compact file taken apart.

    Attributes:
        table: The JSON object in its metadata.
        tensors: ``{name: (dtype, shape, bytes)}`` in the order of the checksum.
    """

    table: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]


class Hostile(NamedTuple):
    """One way to be wrong: a name, what makes the bytes, and words of the error."""

    name: str
    spoil: Callable[[], bytes]
    says: tuple[str, ...]


def sound_adapter() -> Adapter:
    block = torch.zeros(16, 12, dtype=torch.bool)
    block[4:8, 8:12] = block[8:12, 0:4] = block[0, 1] = block[15, 11] = True
    return Adapter(
        {
            GAPS: SparseDelta(
                Support(SHAPES[GAPS], torch.tensor([5, 6, 9, 44])),
                torch.tensor([0.5, -1.0, 2.0, 0.25]).bfloat16(),
            ),
            BLOCKS: SparseDelta(Support.from_mask(block), torch.arange(1.0, 35.0).half()),
            SEED: SparseDelta(
                random_support(SHAPES[SEED], 7, seed=3, name=SEED), torch.arange(-3.0, 4.0)
            ),
        },
        {
            "mask_type": "random",
            "random_seed": 3,
            "base_model_name_or_path": "some/model",
            "base_fingerprint": {GAPS: "float32:0123456789abcdef"},
        },
    )


def write_sound(path: Path) -> Path:
    """The sound file; int8 values where the seed stands for the indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sound_bytes())
    return path


def sound_bytes() -> bytes:
    return compose(sound_parts())


@functools.cache
def _written() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        save(sound_adapter(), path)
        return path.read_bytes()


def sound_parts() -> Parts:
    parts = take_apart(_written())
    parts.table["parameters"][SEED] |= {"values": "I8", "scale": 0.25}
    parts.tensors[f"{SEED}.values"] = ("I8", [7], struct.pack("7b", -12, -8, -4, 0, 4, 8, 12))
    return parts


def take_apart(raw: bytes) -> Parts:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    table = json.loads(header.pop("__metadata__")["shira"])
    tensors = {}
    for name in table["parameters"]:
        for kind in ("values", "gaps", "blocks", "rest"):
            if claim := header.get(f"{name}.{kind}"):
                start, end = (8 + length + at for at in claim["data_offsets"])
                tensors[f"{name}.{kind}"] = (claim["dtype"], claim["shape"], raw[start:end])
    return Parts(table, tensors)


def compose(parts: Parts, checksum: str | None = None, **metadata: Any) -> bytes:
    """A file of parts; ``metadata`` replaces or, where None, takes out of ``__metadata__``."""
    table = json.dumps(parts.table)
    crc = zlib.crc32(table.encode())
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, raw) in parts.tensors.items():
        crc = zlib.crc32(raw, crc)
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]
        }  # fmt: skip
        data += raw
    texts = {"shira": table, "shira_crc32": checksum or f"{crc:08x}", **metadata}
    header["__metadata__"] = {key: text for key, text in texts.items() if text is not None}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- ways to spoil -----------------------------------------------------------------------------


def _table(*path: str, **changes: Any) -> Callable[[], bytes]:
    """Other fields of the table, or of what is at ``path`` in it; ``_`` takes one out."""

    def spoil() -> bytes:
        parts = sound_parts()
        at: Any = parts.table
        for key in path:
            at = at[key]
        for key, value in changes.items():
            if value is _OUT:
                del at[key]
            else:
                at[key] = value
        return compose(parts)

    return spoil


_OUT = object()


def _record(name: str, **changes: Any) -> Callable[[], bytes]:
    return _table("parameters", name, **changes)


def _tensor(
    name: str, dtype: str | None = None, shape: list[int] | None = None, raw: bytes | None = None
) -> Callable[[], bytes]:
    def spoil() -> bytes:
        parts = sound_parts()
        old = parts.tensors[name]
        content = old[2] if raw is None else raw
        parts.tensors[name] = (dtype or old[0], shape or [len(content)], content)
        return compose(parts)

    return spoil


def _without(name: str) -> Callable[[], bytes]:
    def spoil() -> bytes:
        parts = sound_parts()
        del parts.tensors[name]
        return compose(parts)

    return spoil


def _added(name: str) -> Callable[[], bytes]:
    def spoil() -> bytes:
        parts = sound_parts()
        parts.tensors[name] = ("U8", [1], b"\0")
        return compose(parts)

    return spoil


def _head(
    dtype: str = "F32",
    shape: list[int] | None = None,
    raw: bytes = bytes(8),
    *,
    table: Any = None,
    name: str = "head",
) -> Callable[[], bytes]:
    """A file with a whole tensor of two entries, of which the table may say something else."""

    def spoil() -> bytes:
        parts = sound_parts()
        claim = {"dtype": dtype, "shape": shape or [2]}
        told = {name: claim if table is None else table}
        parts.table.update(version=2, tensors=told)
        parts.tensors[f"{name}.whole"] = (dtype, shape or [2], raw)
        return compose(parts)

    return spoil


def _renamed(old: str, new: str) -> Callable[[], bytes]:
    def spoil() -> bytes:
        parts = sound_parts()
        tensors = {key.replace(old, new): value for key, value in parts.tensors.items()}
        return compose(Parts(parts.table, tensors))

    return spoil


def _text(**metadata: Any) -> Callable[[], bytes]:
    return lambda: compose(sound_parts(), **metadata)


def _flipped(tensor: str, byte: int, bit: int) -> Callable[[], bytes]:
    """One bit of a tensor other than the checksum knows it."""

    def spoil() -> bytes:
        raw = sound_bytes()
        length = int.from_bytes(raw[:8], "little")
        at = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0] + 8 + length + byte
        return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]

    return spoil


def _whole(change: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    return lambda: change(sound_bytes())


def _float16(value: float) -> bytes:
    return struct.pack("<e", value) * 34


def _repeated_key(raw: bytes) -> bytes:
    """The table with one parameter's k twice."""
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'\\"k\\": 4', b'\\"k\\": 4, \\"k\\": 4', 1)
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def _claims(shape: list[int], k: int) -> Callable[[], bytes]:
    """A table, and a header, of far more than the file has."""

    def spoil() -> bytes:
        parts = sound_parts()
        parts.table["parameters"][GAPS] |= {"shape": shape, "k": k}
        raw = compose(parts)
        old, new = (
            b'"shape": [4], "data_offsets": [0, 8]',
            f'"shape": [{k}], "data_offsets": [0, 8]',
        )
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].replace(old, new.encode(), 1)
        return struct.pack("<Q", len(header)) + header + raw[8 + length :]

    return spoil


_BF16_NAN, _BF16_INF = b"\xc0\x7f", b"\x80\x7f"

HOSTILE: tuple[Hostile, ...] = (
    # The table
    Hostile("no_table", _text(shira=None), ("not a SHiRA adapter",)),
    Hostile("no_checksum", _text(shira_crc32=None), ("'shira_crc32'",)),
    Hostile("wrong_checksum", _text(shira_crc32="00000000"), ("damaged", "'00000000'")),
    Hostile("checksum_no_number", _text(shira_crc32="good"), ("damaged", "'good'")),
    Hostile("table_no_json", _text(shira="{version: 1}"), ("table is not valid JSON",)),
    Hostile("table_a_list", _text(shira="[1]"), ("table is a JSON object",)),
    Hostile("table_empty", _text(shira=""), ("table is not valid JSON",)),
    Hostile("table_nested", _text(shira='{"a":' + "[" * 100_000), ("nested",)),
    Hostile("table_with_nan", _text(shira='{"version": NaN}'), ("NaN",)),
    Hostile("table_repeats_a_key", _whole(_repeated_key), ("duplicate key 'k'",)),
    Hostile("table_of_empty_lists", _text(shira='{"a":[' + "[]," * 200_000 + "0]}"),
            ("too large", "memory")),
    Hostile("later_version", _table(version=3), ("version 3", "newer shira")),
    Hostile("version_2_without_tensors", _table(version=2), ("'tensors' is missing",)),
    Hostile("version_1_with_tensors", _table(tensors={}), ("unknown field 'tensors'",)),
    Hostile("whole_no_object", _head(table=[2]), ("'head'", "an object for each")),
    Hostile("whole_no_dtype", _head(table={"shape": [2]}), ("'head'", "'dtype' is missing")),
    Hostile("whole_unknown_field", _head(table={"dtype": "F32", "shape": [2], "scale": 1}),
            ("'head'", "unknown field 'scale'")),
    Hostile("whole_bool", _head("BOOL", [2], b"\1\0"), ("'head'", "'BOOL'")),
    Hostile("whole_negative_size", _head(table={"dtype": "F32", "shape": [-2]}),
            ("'head'", "negative size")),
    Hostile("whole_nan", _head(raw=b"\0\0\xc0\x7f" * 2), ("'head'", "not finite: 2 NaN")),
    Hostile("whole_other_shape", _head(table={"dtype": "F32", "shape": [1, 2]}),
            ("'head.whole'", "shape (2,) is not (1, 2)")),
    Hostile("whole_other_dtype", _head("I32", table={"dtype": "F32", "shape": [2]}),
            ("'head.whole'", "dtype I32 is not F32")),
    Hostile("whole_missing", _table(version=2, tensors={"head": {"dtype": "F32", "shape": [2]}}),
            ("missing tensor 'head.whole'",)),
    Hostile("whole_not_in_the_table", _added("head.whole"), ("'head.whole'", "does not name it")),
    Hostile("whole_and_sparse", _head(name=GAPS), (repr(GAPS), "entries of it as well")),
    Hostile("version_zero", _table(version=0), ("version is a whole number",)),
    Hostile("version_text", _table(version="1"), ("version is a whole number",)),
    Hostile("version_true", _table(version=True), ("version is a whole number",)),
    Hostile("no_version", _table(version=_OUT), ("version is a whole number",)),
    Hostile("no_parameters", _table(parameters=_OUT), ("'parameters' is missing",)),
    Hostile("parameters_a_list", _table(parameters=[]), ("parameters is no dict",)),
    Hostile("metadata_a_text", _table(metadata="x"), ("metadata is no dict",)),
    Hostile("library_a_number", _table(library=1), ("library is no str",)),
    Hostile("unknown_part", _table(paramters={}), ("'paramters'", "Did you mean 'parameters'")),
    Hostile("tied_to_no_name", _table("metadata", tied_weights={GAPS: {}}), ("tied_weights",)),
    Hostile("fingerprint_malformed", _table("metadata", base_fingerprint={GAPS: "float32:x"}),
            ("base_fingerprint", GAPS)),
    Hostile("rounded_fingerprints_malformed",
            _table("metadata", base_fingerprint_rounded={GAPS: ["float32:" + "0" * 16, 4]}),
            ("base_fingerprint_rounded", GAPS)),
    # A parameter's record
    Hostile("record_a_number", _table("parameters", **{GAPS: 4}), (GAPS, "an object")),
    Hostile("unknown_coding", _record(GAPS, indices="gap"), (GAPS, "Did you mean 'gaps'")),
    Hostile("coding_a_list", _record(GAPS, indices=["gaps"]), (GAPS, "unknown coding")),
    Hostile("no_shape", _record(GAPS, shape=_OUT), (GAPS, "'shape' is missing")),
    Hostile("negative_size", _record(GAPS, shape=[-8, -6]), (GAPS, "negative size")),
    Hostile("fractional_size", _record(GAPS, shape=[8.0, 6]), (GAPS, "list of sizes")),
    Hostile("shape_a_text", _record(GAPS, shape="8x6"), (GAPS, "list of sizes")),
    Hostile("weight_too_large", _record(GAPS, shape=[2**31, 2**31]), (GAPS, "too large")),
    Hostile("sizes_multiply_past_64_bits", _record(GAPS, shape=[2**40, 2**40]),
            (GAPS, "too large")),
    Hostile("k_negative", _record(GAPS, k=-1), (GAPS, "k is a number")),
    Hostile("k_fractional", _record(GAPS, k=4.5), (GAPS, "k is a number")),
    Hostile("k_beyond_the_weight", _record(GAPS, k=49), (GAPS, "k is a number")),
    Hostile("k_unlike_the_values", _record(GAPS, k=3), (f"{GAPS}.values", "(3,)")),
    Hostile("values_of_another_dtype", _record(GAPS, values="F16"), (f"{GAPS}.values", "BF16")),
    Hostile("values_of_no_dtype", _record(GAPS, values="I32"), (GAPS, "'I32'")),
    Hostile("unknown_field", _record(GAPS, zip=1), (GAPS, "'zip'")),
    Hostile("scale_of_floats", _record(GAPS, scale=1.0), (GAPS, "'scale'")),
    Hostile("no_scale", _record(SEED, scale=_OUT), (SEED, "'scale' is missing")),
    Hostile("scale_negative", _record(SEED, scale=-1.0), (SEED, "scale is")),
    Hostile("scale_overflows", _record(SEED, scale=2.0**122), (SEED, "scale is")),
    Hostile("scale_a_huge_integer", _record(SEED, scale=10**39), (SEED, "scale is")),
    Hostile("scale_no_float32", _record(SEED, scale=0.1), (SEED, "scale is")),
    Hostile("scale_a_text", _record(SEED, scale="0.25"), (SEED, "scale is")),
    Hostile("block_missing", _record(BLOCKS, block=_OUT), (BLOCKS, "'block' is missing")),
    Hostile("block_one_number", _record(BLOCKS, block=4), (BLOCKS, "[height, width]")),
    Hostile("block_of_zero", _record(BLOCKS, block=[0, 4]), (BLOCKS, "[height, width]")),
    Hostile("block_enormous", _record(BLOCKS, block=[2**63, 4]), (BLOCKS, "[height, width]")),
    Hostile("block_of_another_size", _record(BLOCKS, block=[4, 3]), (BLOCKS, "entries")),
    Hostile("seed_fractional", _record(SEED, seed=3.5), (SEED, "whole numbers")),
    Hostile("slot_negative", _record(SEED, slot=-1), (SEED, "whole numbers")),
    Hostile("slot_beyond", _record(SEED, slot=99), (SEED, "slot 99")),
    Hostile("slot_enormous", _record(SEED, slot=10**39), (SEED, "slot 1000")),
    Hostile("another_seed", _record(SEED, seed=4), (SEED, "the seed gives indices of checksum")),
    Hostile("another_slot", _record(SEED, slot=1), (SEED, "the seed gives indices of checksum")),
    Hostile("check_malformed", _record(SEED, check="xyz"), (SEED, "eight hex digits")),
    # Names
    Hostile("no_values", _without(f"{GAPS}.values"), ("missing tensor", f"{GAPS}.values")),
    Hostile("no_gaps", _without(f"{GAPS}.gaps"), ("missing tensor", f"{GAPS}.gaps")),
    Hostile("no_blocks", _without(f"{BLOCKS}.blocks"), ("missing tensor", f"{BLOCKS}.blocks")),
    Hostile("no_rest", _without(f"{BLOCKS}.rest"), (f"{BLOCKS}.blocks", "34 values")),
    Hostile("another_tensor", _added("d.weight.gaps"), ("d.weight.gaps", "does not name it")),
    Hostile("rest_of_gaps", _added(f"{GAPS}.rest"), (f"{GAPS}.rest", "does not name it")),
    Hostile("another_parameter", _renamed("a.weight", "a.wieght"), ("'a.wieght.values'",)),
    # Values
    Hostile("nan", _tensor(f"{GAPS}.values", shape=[4], raw=_BF16_NAN * 4),
            (f"{GAPS}.values", "4 NaN")),
    Hostile("infinity", _tensor(f"{GAPS}.values", shape=[4], raw=_BF16_INF * 4),
            (f"{GAPS}.values", "4 infinite")),
    Hostile("infinity_f16", _tensor(f"{BLOCKS}.values", shape=[34], raw=_float16(float("-inf"))),
            (f"{BLOCKS}.values", "34 infinite")),
    Hostile("int8_out_of_range", _tensor(f"{SEED}.values", raw=b"\x80" * 7),
            (f"{SEED}.values", "-128")),
    Hostile("values_two_dimensional", _tensor(f"{GAPS}.values", shape=[2, 2]),
            (f"{GAPS}.values", "(2, 2)")),
    # Gaps
    Hostile("gaps_signed", _tensor(f"{GAPS}.gaps", "I8"), (f"{GAPS}.gaps", "I8")),
    Hostile("gaps_floating", _tensor(f"{GAPS}.gaps", "F32", [1]), (f"{GAPS}.gaps", "F32")),
    Hostile("gaps_two_dimensional", _tensor(f"{GAPS}.gaps", shape=[2, 2]),
            (f"{GAPS}.gaps", "(2, 2)")),
    Hostile("fewer_gaps", _tensor(f"{GAPS}.gaps", raw=b"\0\0\0"), (f"{GAPS}.gaps", "3 entries")),
    Hostile("more_gaps", _tensor(f"{GAPS}.gaps", raw=b"\0" * 5), (f"{GAPS}.gaps", "5 entries")),
    Hostile("no_units", _tensor(f"{GAPS}.gaps", shape=[0], raw=b""), (f"{GAPS}.gaps", "0 entries")),
    Hostile("last_gap_open", _tensor(f"{GAPS}.gaps", raw=b"\0\0\0\0\xff"),
            (f"{GAPS}.gaps", "does not end")),
    Hostile("only_escapes", _tensor(f"{GAPS}.gaps", raw=b"\xff" * 1000),
            (f"{GAPS}.gaps", "does not end")),
    Hostile("index_out_of_range", _tensor(f"{GAPS}.gaps", raw=b"\0\0\0\x2d"),
            (f"{GAPS}.gaps", "index 48 is out of range")),
    Hostile("index_far_out_of_range", _tensor(f"{GAPS}.gaps", raw=b"\xff" * 100_000 + b"\0" * 4),
            (f"{GAPS}.gaps", "out of range")),
    Hostile("wide_index_out_of_range",
            _tensor(f"{GAPS}.gaps", "U16", [4], b"\xfe\xff" + b"\0" * 6),
            (f"{GAPS}.gaps", "index 65537 is out of range")),
    Hostile("gaps_sum_past_32_bits",
            _tensor(f"{GAPS}.gaps", "U32", [5], b"\xff" * 16 + b"\0" * 4),
            (f"{GAPS}.gaps", "1 entries")),
    Hostile("index_past_32_bits",
            _tensor(f"{GAPS}.gaps", "U32", [6], b"\xff" * 8 + b"\0" * 16),
            (f"{GAPS}.gaps", "index 8589934593 is out of range")),
    # Blocks
    Hostile("block_out_of_range", _tensor(f"{BLOCKS}.blocks", raw=b"\x05\x06"),
            (f"{BLOCKS}.blocks", "index 12 is out of range")),
    Hostile("more_blocks", _tensor(f"{BLOCKS}.blocks", raw=b"\0\0\0"),
            (f"{BLOCKS}.blocks", "50 entries")),
    Hostile("blocks_open", _tensor(f"{BLOCKS}.blocks", raw=b"\x05\0\xff"),
            (f"{BLOCKS}.blocks", "does not end")),
    Hostile("blocks_signed", _tensor(f"{BLOCKS}.blocks", "I8"), (f"{BLOCKS}.blocks", "I8")),
    Hostile("rest_in_a_block", _tensor(f"{BLOCKS}.rest", raw=b"\x01\x37"),
            (f"{BLOCKS}.rest", "in one of the blocks")),
    Hostile("rest_out_of_range", _tensor(f"{BLOCKS}.rest", raw=b"\x01\xbe"),
            (f"{BLOCKS}.rest", "index 192 is out of range")),
    Hostile("rest_open", _tensor(f"{BLOCKS}.rest", raw=b"\x01\xbd\xff"),
            (f"{BLOCKS}.rest", "does not end")),
    Hostile("fewer_in_the_rest", _tensor(f"{BLOCKS}.rest", raw=b"\x01"),
            (f"{BLOCKS}.blocks", "33 entries")),
    # Damage
    Hostile("bit_in_values", _flipped(f"{GAPS}.values", 2, 3), ("damaged", "checksum")),
    Hostile("bit_in_int8_values", _flipped(f"{SEED}.values", 2, 0), ("damaged", "checksum")),
    Hostile("bit_in_gaps", _flipped(f"{GAPS}.gaps", 0, 0), ("damaged", "checksum")),
    Hostile("bit_in_rest", _flipped(f"{BLOCKS}.rest", 0, 0), ("damaged", "checksum")),
    Hostile("letter_in_the_table", _whole(lambda raw: raw.replace(b"some/model", b"some/nodel")),
            ("damaged", "checksum")),
    # The safetensors file
    Hostile("empty_file", lambda: b"", ("truncated",)),
    Hostile("cut_in_header", _whole(lambda raw: raw[:200]), ("truncated",)),
    Hostile("cut_in_data", _whole(lambda raw: raw[:-3]), ("truncated",)),
    Hostile("trailing_bytes", _whole(lambda raw: raw + b"\0" * 8), ("8 bytes follow",)),
    Hostile("header_of_2_to_60", _whole(lambda raw: struct.pack("<Q", 2**60) + raw[8:]),
            ("too large",)),
    Hostile("pickle", lambda: pickle.dumps({"a": [1.0]}, protocol=4), ("pickle",)),
    Hostile("claims_10_to_12_entries", _claims([10**7, 10**7], 10**12), ("size",)),
)  # fmt: skip
