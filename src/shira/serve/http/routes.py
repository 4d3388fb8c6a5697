# SPDX-License-Identifier: Apache-2.0
"""The service's own routes: a JSON body in, a status and a JSON value out; no web framework.

Errors are as OpenAI's API writes them: ``{"error": {message, type, param, code}}``.

A body has `BODY_LIMIT` bytes at most, so that reading it holds up no one, and is strict JSON: no
NaN, no key twice.

==========================  ====================================================================
POST /v1/load_shira_adapter      ``{"name": "fr", "path": "french"}``, or
                                 ``{"name": "mix", "adapters": {"fr": 0.5, "de": 1}}``
POST /v1/unload_shira_adapter    ``{"name": "fr"}``
POST /v1/activate_shira_adapter  ``{"name": "fr"}``; null, or the base's name, for the base
GET  /v1/shira_adapters          what is served, what is active, who waits
==========================  ====================================================================
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from shira.errors import (
    AdapterError,
    ConfigError,
    FileFormatError,
    ServeError,
    ShiraError,
    UnknownAdapterError,
    did_you_mean,
)
from shira.serve.http.names import NameTakenError, PathRefusedError
from shira.serve.http.service import AdapterService
from shira.store.json_text import parse_object

LOAD = "/v1/load_shira_adapter"
UNLOAD = "/v1/unload_shira_adapter"
ACTIVATE = "/v1/activate_shira_adapter"
LIST = "/v1/shira_adapters"

BODY_LIMIT = 64 * 2**10
"""The largest body of these routes, in bytes."""


class TooLargeError(AdapterError):
    """A body that has more bytes, or more items, than the server reads."""


# The method of each route, and the fields that it takes beside the name, which it needs.
_ROUTES: dict[str, tuple[Callable[..., Awaitable[dict[str, Any]]], set[str]]] = {
    LOAD: (AdapterService.load, {"path", "adapters"}),
    UNLOAD: (AdapterService.unload, set()),
    ACTIVATE: (AdapterService.activate, set()),
}
OWN_PATHS = frozenset(_ROUTES)

# Status and kind of an error: of the first line that it fits.
_KINDS: tuple[tuple[Any, int, str], ...] = (
    ((UnknownAdapterError, FileNotFoundError), 404, "NotFoundError"),
    (NameTakenError, 409, "ConflictError"),
    (PathRefusedError, 403, "PermissionDeniedError"),
    (TooLargeError, 413, "BadRequestError"),
    ((AdapterError, ConfigError, FileFormatError), 400, "BadRequestError"),
    (ShiraError, 503, "ServiceUnavailableError"),  # an engine that cannot now
    (BaseException, 500, "InternalServerError"),
)

_LONGEST = 4000  # characters of a message, of which a client's own words may be the most


async def answer(
    service: AdapterService | None, path: str, data: bytes = b""
) -> tuple[int, dict[str, Any]]:
    """Return status and JSON value for a request to one of the routes; never raises an Exception.

    The service is None as long as there is no engine.
    """
    try:
        if service is None:
            raise ServeError("this server has no engine, or it is not ready")
        if path == LIST:
            return 200, service.list()
        method, optional = _ROUTES[path]
        if len(data) > BODY_LIMIT:
            raise TooLargeError(f"a body of {path} has {BODY_LIMIT} bytes at most")
        fields = parse_object(data, path, "body")
        for field in sorted(fields.keys() - {"name", *optional}):
            hint = did_you_mean(field, ["name", *optional])
            raise AdapterError(f"there is no field {field[:100]!r} in {path}.{hint}")
        if "name" not in fields:
            raise AdapterError(f"{path} needs the field name")
        return 200, await method(service, **fields)
    except Exception as error:
        return describe(error)


def encoded(value: dict[str, Any]) -> bytes:
    """Return a response's JSON in ASCII, whatever is in it, without NaN and infinity."""
    return json.dumps(value, allow_nan=False).encode()


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return status and body for an error.

    What the caller can mend is told in full; what he cannot (a defect, an engine that has died) is
    told by its kind alone when it is none of shira's.
    """
    _, status, kind = next(line for line in _KINDS if isinstance(error, line[0]))
    if isinstance(error, ShiraError | FileNotFoundError):
        message = str(error)
    else:
        message = f"the server failed: {type(error).__name__}"
    message = message[:_LONGEST].encode(errors="backslashreplace").decode()  # lone surrogates
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
