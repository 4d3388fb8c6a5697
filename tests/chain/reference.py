# SPDX-License-Identifier: Apache-2.0
"""Links as ``docs/chain.md`` specifies them, read and written slowly, with nothing of shira's.

One entry after the other in Python's own integers; what `shira.chain` does must be the same bits.
"""

from __future__ import annotations

import json
import struct
import zlib

PIECE = 2**23
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # else 1


def applied(link: bytes, old: dict[str, bytes]) -> dict[str, bytes]:
    """The safetensors files that a link makes, by name, of the bytes of the old tensors."""
    header = json.loads(link[8 : 8 + int.from_bytes(link[:8], "little")])
    body = link[8 + int.from_bytes(link[:8], "little") :]
    data, table = (body[slice(*header[name]["data_offsets"])] for name in ("data", "table"))
    told = json.loads(zlib.decompress(table))
    at, tensors = 0, {}
    places = {key: place for text in told["files"].values() for key, place in _places(text)}
    for key, claim in told["tensors"].items():
        source = claim.get("from", key)
        before = None if source is None else old[source]
        if "pieces" not in claim:
            tensors[key] = before
            continue
        width = WIDTHS.get(places[key]["dtype"], 1)
        size = places[key]["data_offsets"][1] - places[key]["data_offsets"][0]
        made = b""
        for number, length in enumerate(claim["pieces"]):
            piece = None if before is None else before[number * PIECE : (number + 1) * PIECE]
            count = min(PIECE, size - number * PIECE) // width
            made += decoded(data[at : at + length], piece, count, width)
            at += length
        tensors[key] = made
    files = {}
    for name, text in told["files"].items():
        order = sorted(_places(text), key=lambda item: item[1]["data_offsets"])
        parts = [len(text.encode()).to_bytes(8, "little"), text.encode()]
        files[name] = b"".join([*parts, *(tensors[key] for key, _ in order)])
    return files


def _places(text: str):
    return [item for item in json.loads(text).items() if item[0] != "__metadata__"]


def decoded(coded: bytes, old: bytes | None, count: int, width: int) -> bytes:
    """The bytes of a piece of ``count`` entries."""
    if not coded:
        return old
    if coded[0] == 2:
        return _joined(_planes(coded, 1, count, width)[0], width)
    numbers = [int.from_bytes(old[i : i + width], "little") for i in range(0, count * width, width)]
    shift, mask = (8 * width - 9, 255) if width > 1 else (0, 127)
    classes = [(number >> shift) & mask for number in numbers]
    _, bound, first, second = struct.unpack_from("<BBII", coded)
    low = sorted((i for i in range(count) if classes[i] < bound), key=lambda i: classes[i])
    at, where = 10, []
    for listed, among in ((first, low), (second, range(count))):
        unit, length = struct.unpack_from("<BI", coded, at)
        gaps, at = _planes(coded, at + 5, length, unit)
        position, found = -1, []
        for gap in gaps:
            position += gap
            if gap != 256**unit - 1:
                position += 1
                found.append(among[position])
        assert len(found) == listed
        where += found
    zigzag, at = _planes(coded, at, len(where), width)
    assert at == len(coded)
    for i, z in zip(where, zigzag, strict=True):
        numbers[i] = (numbers[i] + (-(z + 1) // 2 if z % 2 else z // 2)) % 256**width
    return _joined(numbers, width)


def _planes(coded: bytes, at: int, count: int, width: int) -> tuple[list[int], int]:
    numbers = [0] * count
    for place in range(width):
        (length,) = struct.unpack_from("<I", coded, at)
        raw = coded[at + 4 : at + 4 + length]
        at += 4 + length
        if length < count:
            raw = zlib.decompress(raw, -15)
        assert len(raw) == count
        numbers = [
            number + (byte << (8 * place)) for number, byte in zip(numbers, raw, strict=True)
        ]
    return numbers, at


def _joined(numbers: list[int], width: int) -> bytes:
    return b"".join(number.to_bytes(width, "little") for number in numbers)
