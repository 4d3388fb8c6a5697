# SPDX-License-Identifier: Apache-2.0
"""JSON that came from a file one does not trust; used by every reader in ``shira.store``.

Stricter than ``json.loads``: the text is UTF-8, the outermost value is an object, no key occurs
twice in one object (which one would win?), and NaN and infinity, which JSON does not have, are
refused.
"""

from __future__ import annotations

import json
import os
from typing import Any

from shira.errors import FileFormatError


def parse_object(raw: bytes, path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The JSON object in ``raw``.

    Args:
        raw: UTF-8 text.
        path: The file, for messages.
        what: What in the file the text is, for messages: ``"header"``.

    Raises:
        FileFormatError: If it is not JSON, or no object, or repeats a key.
    """
    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_repeated_keys, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FileFormatError(
            f"{os.fspath(path)}: the {what} is not valid JSON: {cause}"
        ) from error
    if not isinstance(parsed, dict):
        raise FileFormatError(
            f"{os.fspath(path)}: the {what} is a JSON object, not a {type(parsed).__name__}"
        )
    return parsed


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
