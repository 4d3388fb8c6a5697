# SPDX-License-Identifier: Apache-2.0
"""Errors as OpenAI's API writes them: a status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
from typing import Any

from shira.errors import AdapterError, ConfigError, FileFormatError, ShiraError, UnknownAdapterError
from shira.serve.http.paths import PathRefusedError


class NameTakenError(AdapterError):
    """A name that another adapter or the base model has already."""


class TooLargeError(AdapterError):
    """A body that has more bytes, or more items, than the server reads."""


_LONGEST = 4000  # characters of a message, of which a client's own words may be the most


def encoded(value: dict[str, Any]) -> bytes:
    """Return a response's JSON in ASCII, whatever is in it, without NaN and infinity."""
    return json.dumps(value, allow_nan=False).encode()


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body for an error.

    What the caller can mend is told in full; what he cannot (a defect, an engine that has died) is
    told by its kind alone when it is none of shira's.
    """
    status, kind = _kind(error)
    if isinstance(error, ShiraError | FileNotFoundError):
        message = str(error)
    else:
        message = f"the server failed: {type(error).__name__}"
    return status, body(message, kind, status)


def body(message: str, kind: str, status: int, param: str | None = None) -> dict[str, Any]:
    """Return the JSON value of an error; lone surrogates are shown as escapes."""
    message = message[:_LONGEST].encode(errors="backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _kind(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UnknownAdapterError | FileNotFoundError):
        return 404, "NotFoundError"
    if isinstance(error, NameTakenError):
        return 409, "ConflictError"
    if isinstance(error, PathRefusedError):
        return 403, "PermissionDeniedError"
    if isinstance(error, TooLargeError):
        return 413, "BadRequestError"
    if isinstance(error, AdapterError | ConfigError | FileFormatError):
        return 400, "BadRequestError"
    if isinstance(error, ShiraError):  # an engine that cannot now
        return 503, "ServiceUnavailableError"
    return 500, "InternalServerError"
