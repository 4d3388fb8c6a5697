# SPDX-License-Identifier: Apache-2.0
"""JSON that came from a file one does not trust; used by every reader of shira's.

A file is opened only if it is a regular one. Parsing is stricter than ``json.loads``: the text is
UTF-8, the outermost value is an object, no key occurs twice in one object (which one would win?),
and NaN and infinity, which JSON does not have, are refused. So are numbers that float64 has not,
integers of more than 40 digits, whose arithmetic takes a minute, half of a surrogate pair, which no
UTF-8 can hold, and a text that would take far more memory than the file it stands in: two bytes of
it can make a Python object of sixty.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO

from shira.errors import ConfigError, FileFormatError

_OBJECT, _ITEM = 184, 64  # bytes of a small dictionary, and of a list, a text or a number
_FREE = 2**23  # bytes that a text may take without being measured against its file
_DIGITS = 40  # of an integer
_NUMBER = 400  # characters of another number
_NUMEL = 2**62  # entries of a weight
_DIMENSIONS = 32  # of a weight
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONG = re.compile(rf"\d{{{_DIGITS + 1}}}")
_TIMES = 8  # the size of the file is what a larger one may


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device would block or never end.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileFormatError(f"{os.fspath(path)}: not a regular file")
    return open(path, "rb")


def read_object(path: str | os.PathLike[str], what: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is larger, no regular file, or as for `parse_object`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FileFormatError(
                f"{os.fspath(path)}: {size} bytes are too large for a {what} (limit {limit})"
            )
        return parse_object(file.read(size), path, what)


def parse_object(
    raw: bytes | str, path: str | os.PathLike[str], what: str, size: int | None = None
) -> dict[str, Any]:
    """Return the JSON object in ``raw``, which is ``what`` in the file at ``path``.

    ``size`` is that of the file in bytes; None: the text is all of it.

    Raises:
        FileFormatError: If it is not JSON, or no object, or repeats a key, or has more items than a
            file of its size has use for.
    """
    raw = raw.encode() if isinstance(raw, str) else raw
    size = len(raw) if size is None else size
    # About what the parsed text takes, a little too much rather than too little.
    memory = raw.count(b"{") * _OBJECT + (raw.count(b"[") + raw.count(b",")) * _ITEM
    if memory > max(_FREE, _TIMES * size):
        raise FileFormatError(
            f"{os.fspath(path)}: the {what} is too large: its items would take about {memory} "
            f"bytes of memory, in a file of {size}"
        )
    try:
        text = raw.decode()
        parsed = json.loads(
            text,
            object_pairs_hook=_no_repeated_keys,
            parse_constant=_number,
            parse_int=_integer if _LONG.search(text) else int,
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


def write_object(value: Mapping[str, Any], metadata: Mapping[str, Any], **style: Any) -> str:
    """Return an object as JSON text that `parse_object` reads again.

    Raises:
        ConfigError: If a field of the adapter's ``metadata``, which is in the object, or a name in
            it cannot be written so.
    """
    parts = {f"field {field!r} of the adapter's metadata": told for field, told in metadata.items()}
    text = ""
    for what, part in (*parts.items(), ("the adapter's metadata", value)):
        try:
            text = json.dumps(part, allow_nan=False, **style)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{what} cannot be written as JSON, whose keys are texts: {error}"
            ) from error
    try:
        parse_object(text, "the adapter", "metadata")
    except FileFormatError as error:
        raise ConfigError(f"{error}; a file with it could not be read again") from error
    return text


def shape_in(value: Any) -> tuple[int, ...]:
    """Return the shape of a weight that a file records as a list of sizes.

    Raises:
        ValueError: If it is none, has more than 32 dimensions, or 2^62 entries or more.
    """
    if not isinstance(value, list) or not {int}.issuperset(map(type, value)):
        raise ValueError(f"the shape is a list of sizes (integers), not {reprlib.repr(value)}")
    if min(value, default=0) < 0:
        raise ValueError(f"negative size in shape {reprlib.repr(value)}")
    if len(value) > _DIMENSIONS:
        raise ValueError(f"a shape of {len(value)} dimensions (limit {_DIMENSIONS})")
    if math.prod(filter(None, value)) >= _NUMEL:
        raise ValueError(f"the sizes {reprlib.repr(value)} are too large (limit 2^62 entries)")
    return tuple(value)


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {key!r}")
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
