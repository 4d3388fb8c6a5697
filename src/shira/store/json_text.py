# SPDX-License-Identifier: Apache-2.0
"""JSON that came from a file one does not trust; used by every reader in ``shira.store``.

Stricter than ``json.loads``: the text is UTF-8, the outermost value is an object, no key occurs
twice in one object (which one would win?), and NaN and infinity, which JSON does not have, are
refused. So are numbers that float64 has not, integers of more than 40 digits, whose arithmetic
takes a minute, half of a surrogate pair, which no UTF-8 can hold, and a text that would take far
more memory than the file it stands in: two bytes of it can make a Python object of sixty.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from typing import Any

from shira.errors import ConfigError, FileFormatError

_OBJECT, _ITEM = 184, 64  # bytes of a small dictionary, and of a list, a text or a number
_FREE = 2**23  # bytes that a text may take without being measured against its file
_DIGITS = 40  # of an integer
_NUMBER = 400  # characters of another number
_NUMEL = 2**62  # entries of a weight
_DIMENSIONS = 32  # of a weight
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TIMES = 8  # the size of the file is what a larger one may


def parse_object(
    raw: bytes | str, path: str | os.PathLike[str], what: str, size: int | None = None
) -> dict[str, Any]:
    """The JSON object in ``raw``.

    Args:
        raw: The text, or its UTF-8.
        path: The file, for messages.
        what: What in the file the text is, for messages: ``"header"``.
        size: Of the file in bytes; None: the text is all of it.

    Raises:
        FileFormatError: If it is not JSON, or no object, or repeats a key, or has more items than a
            file of its size has use for.
    """
    size = len(raw) if size is None else size
    memory = _memory(raw)
    if memory > max(_FREE, _TIMES * size):
        raise FileFormatError(
            f"{os.fspath(path)}: the {what} is too large: its items would take about {memory} "
            f"bytes of memory, in a file of {size}"
        )
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        parsed = json.loads(
            text,
            object_pairs_hook=_no_repeated_keys,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
        if not text.isascii() or _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, UnicodeEncodeError):
            cause = "half of a surrogate pair"
        raise FileFormatError(
            f"{os.fspath(path)}: the {what} is not valid JSON: {cause}"
        ) from error
    if not isinstance(parsed, dict):
        raise FileFormatError(
            f"{os.fspath(path)}: the {what} is a JSON object, not a {type(parsed).__name__}"
        )
    return parsed


def check_readable(text: str) -> None:
    """Check that JSON which is about to be written will be read again.

    Raises:
        ConfigError: If `parse_object` refuses it: a number or a text in it cannot be written.
    """
    try:
        parse_object(text, "the adapter", "metadata")
    except FileFormatError as error:
        raise ConfigError(f"{error}; a file with it could not be read again") from error


def shape_in(value: Any) -> tuple[int, ...]:
    """Return the shape of a weight that a file records as a list of sizes.

    Raises:
        ValueError: If it is none, has more than 32 dimensions, or 2^62 entries or more.
    """
    if not isinstance(value, list) or not all(type(size) is int for size in value):
        raise ValueError(f"the shape is a list of sizes (integers), not {reprlib.repr(value)}")
    if any(size < 0 for size in value):
        raise ValueError(f"negative size in shape {reprlib.repr(value)}")
    if len(value) > _DIMENSIONS:
        raise ValueError(f"a shape of {len(value)} dimensions (limit {_DIMENSIONS})")
    if math.prod(max(size, 1) for size in value) >= _NUMEL:
        raise ValueError(f"the sizes {reprlib.repr(value)} are too large (limit 2^62 entries)")
    return tuple(value)


def _memory(raw: bytes | str) -> int:
    """About what the parsed text takes, a little too much rather than too little."""
    if isinstance(raw, str):
        return raw.count("{") * _OBJECT + (raw.count("[") + raw.count(",")) * _ITEM
    return raw.count(b"{") * _OBJECT + (raw.count(b"[") + raw.count(b",")) * _ITEM


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return made


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"an integer of {len(text)} digits (limit {_DIGITS})")
    return int(text)


def _number(text: str) -> float:
    value = float(text) if len(text) <= _NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number that float64 has")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
