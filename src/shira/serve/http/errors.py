# SPDX-License-Identifier: Apache-2.0
"""Errors as OpenAI's API writes them: a status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from typing import Any

from shira.errors import AdapterError, ConfigError, FileFormatError, ShiraError, UnknownAdapterError
from shira.serve.http.paths import PathRefusedError


class NameTakenError(AdapterError):
    """A name that another adapter or the base model has already."""


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
    """The JSON value of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _kind(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UnknownAdapterError | FileNotFoundError):
        return 404, "NotFoundError"
    if isinstance(error, NameTakenError):
        return 409, "ConflictError"
    if isinstance(error, PathRefusedError):
        return 403, "PermissionDeniedError"
    if isinstance(error, AdapterError | ConfigError | FileFormatError):
        return 400, "BadRequestError"
    if isinstance(error, ShiraError):  # an engine that cannot now
        return 503, "ServiceUnavailableError"
    return 500, "InternalServerError"
