# SPDX-License-Identifier: Apache-2.0
"""`Turns`: ASGI middleware that lets each request in when the adapter it names is active.

The ``model`` field of the JSON body names the adapter, as with vLLM's LoRA. A request waits for its
turn before the server sees it, and counts as running until its response has been sent, streams
included. Where batches are mixed, it brings its adapter along (`carrying`), and the turn is the
base's; then it waits until the adapter is in memory (`AsyncClient.riding`). The server sees the
base's name in its place: to it there is one model.

Every POST takes part except those that run no model (`IDLE_PATHS`), so that no way to the engine
is open on which an answer could come from the wrong weights. What would go on after its response is
refused (``"background": true``), as are websockets, whose end is not to be foreseen.

Bodies are bounded: those of more bytes or items than the limits below are refused, from the length
that they declare or once as much has come, and what is not small is parsed in a thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, TypeVar

from shira.errors import AdapterError, ServeError
from shira.serve.http import routes
from shira.serve.http.routes import TooLargeError, describe, encoded
from shira.serve.http.service import AdapterService
from shira.serve.messages import Carried

T = TypeVar("T")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

IDLE_PATHS = frozenset().union(
    ["/pause", "/resume", "/sleep", "/wake_up", "/ping", "/abort_requests", "/collective_rpc"],
    ["/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache", "/release_kv_cache_memory"],
    ["/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/weight_checker"],
    ["/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"],
    ["/update_weights", "/update_weight_version"],
    ["/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply"],
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"],
    ["/start_profile", "/stop_profile"],
)
"""POSTs that manage the server."""

_NO_MODEL_RUNS = ("/tokenize", "/detokenize", "/render", "/derender", "/count_tokens", "/cancel")

BODY_LIMIT = 16 * 2**20  # bytes of the largest body that is read, unless `Turns` is told another
# Commas and opening brackets in a body: they, not its length, are what parsing takes long for.
ITEM_LIMIT = 2**19

_LENGTH = b"content-length"
_SMALL = 64 * 2**10  # bytes that are parsed on the event loop

answering: ContextVar[str | None] = ContextVar("answering", default=None)
"""The adapter that answers the request at hand, for who writes its name into the response."""

carrying: ContextVar[Carried | None] = ContextVar("carrying")
"""The luggage of the request at hand, for who hands it to the engine; see `shira.serve.mixed`.

Not set outside of a request that has its turn.
"""


class Turns:
    """The middleware, around an ASGI application.

    Args:
        app: The application.
        service: Gives the service, or None as long as the engine is not there.
        own_paths: Paths of the service itself, which wait for no turn.
        body_limit: Bytes of a body, unless it is of those paths: see `routes.BODY_LIMIT`.
    """

    def __init__(
        self,
        app: Any,
        service: Callable[[], AdapterService | None],
        own_paths: frozenset[str] = frozenset(),
        body_limit: int = BODY_LIMIT,
    ) -> None:
        self.app, self.service = app, service
        self.own_paths, self.body_limit = own_paths, body_limit

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "not with adapters"})
        elif scope["type"] != "http" or scope["method"] != "POST" or _path(scope) in IDLE_PATHS:
            await self.app(scope, receive, send)
        else:
            async with AsyncExitStack() as stack:
                try:
                    admitted = await self._admit(scope, receive, stack)
                except Exception as error:
                    await _refuse(send, error)
                    return
                if admitted is not None:
                    await self.app(*admitted, send)

    async def _admit(
        self, scope: Message, receive: Receive, stack: AsyncExitStack
    ) -> tuple[Message, Receive] | None:
        """Wait until the application may have a request, as long as the stack is open.

        Returns what the application gets; None if the client went away first.
        """
        own = _path(scope) in self.own_paths
        data = await _read(scope, receive, routes.BODY_LIMIT if own else self.body_limit)
        if data is None:
            return None
        if own:
            return scope, _replay(data, receive)
        service, size = self.service(), len(data)
        if service is None:
            raise ServeError("the engine is not ready")
        try:
            request = await _timely(size, _parsed, data)
            adapter = service.resolve(request.get("model"))
            weights = stack.enter_context(service.riding(adapter))
            if request.get("background"):  # whatever a lenient parser takes for true
                raise AdapterError(
                    '"background": true is not possible with adapters in the weights: its answer '
                    "would go on after the turn of its adapter"
                )
            if adapter is not None:
                request["model"] = service.base_models[0]
                data = (await _timely(size, json.dumps, request)).encode()
                others = [each for each in scope["headers"] if each[0].lower() != _LENGTH]
                scope = {**scope, "headers": [*others, (_LENGTH, str(len(data)).encode())]}
        except RecursionError:
            raise AdapterError("the body is nested too deeply") from None
        if _path(scope).endswith(_NO_MODEL_RUNS):
            return scope, _replay(data, receive)
        gone = asyncio.ensure_future(receive())  # nothing but the end of the connection may come
        stack.callback(gone.cancel)
        turn = adapter if weights is None else None  # of the base, on which it rides
        if not await stack.enter_async_context(service.scheduler.using(turn, unless=gone)):
            return None
        carried = None
        if weights is not None:
            brought = service.carrying(weights, unless=gone)
            carried = await stack.enter_async_context(brought)
            if carried is None:
                return None
        stack.callback(answering.reset, answering.set(adapter))
        stack.callback(carrying.reset, carrying.set(carried))
        return scope, _replay(data, receive, gone)


def _replay(
    data: bytes, receive: Receive, pending: asyncio.Future[Message] | None = None
) -> Receive:
    """Return a ``receive`` for the application: the body that was read, then what comes after."""
    body: Message | None = {"type": "http.request", "body": data, "more_body": False}

    async def replay() -> Message:
        nonlocal body, pending
        if body is not None:
            message, body = body, None
        elif pending is not None:
            # Shielded: a listener that is cancelled and asks again must not lose the message.
            message = await asyncio.shield(pending)
            pending = None
        else:
            message = await receive()
        return message

    return replay


async def _read(scope: Message, receive: Receive, limit: int) -> bytes | None:
    """Read the body; None if the client went away; `TooLargeError` beyond the limit."""
    too_large = TooLargeError(f"the body has more than {limit} bytes, the most that is read")
    for key, value in scope["headers"]:
        declared = value if key.lower() == _LENGTH and value.isdigit() else b"0"
        if len(declared) > 15 or int(declared) > limit:
            raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        size += len(part)
        parts.append(part)
        if size > limit:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)


async def _timely(size: int, call: Callable[..., T], *arguments: Any) -> T:
    """Call here for a small body, in a thread for others."""
    return await asyncio.to_thread(call, *arguments) if size > _SMALL else call(*arguments)


def _parsed(data: bytes) -> dict[str, Any]:
    """Return the fields of a JSON body; of another, which the application refuses itself, none."""
    if sum(map(data.count, (b",", b"[", b"{"))) > ITEM_LIMIT:
        raise TooLargeError(f"the body has more than {ITEM_LIMIT} items, the most that are read")
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _path(scope: Message) -> str:
    """The path within the application, whatever it is mounted under."""
    path: str = scope["path"]
    path = path.removeprefix(scope.get("root_path", ""))
    return path.rstrip("/") or "/"


async def _refuse(send: Send, error: BaseException) -> None:
    status, value = describe(error)
    data = encoded(value)
    headers = [(b"content-type", b"application/json"), (_LENGTH, str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
