# SPDX-License-Identifier: Apache-2.0
"""An engine that only keeps a record, and a client of an ASGI application."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

from shira.errors import AdapterError, FileFormatError, ServeError, UnknownAdapterError
from shira.serve.http.turns import carrying
from shira.serve.messages import carried


class FakeEngine:
    """Loads a file whose text is not "damaged"; switches in `seconds`; may be broken."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.held: dict[str, str] = {}
        self.active: dict[str, float] = {}
        self.running = 0
        self.broken = False
        self.calls: list[tuple] = []

    async def load(self, name, path):
        self.calls.append(("load", name, path))
        text = (Path(path) / "adapter" if Path(path).is_dir() else Path(path)).read_text()
        if text == "damaged":
            raise FileFormatError(f"{path} is damaged")
        self.held[name] = text
        return {"digest": text, "nnz": len(text), "parameters": 1, "secret": "not told"}

    async def unload(self, name):
        self.calls.append(("unload", name))
        assert name not in self.active
        del self.held[name]

    async def check(self, weights):
        if any(abs(scale) > 1e38 for scale in weights.values()):
            raise AdapterError("entries would not be finite")

    async def activate(self, weights):
        self.calls.append(("activate", weights))
        assert self.running == 0
        await asyncio.sleep(self.seconds)
        if self.broken:
            raise ServeError("the engine has died")
        if set(weights or {}) - self.held.keys():
            raise UnknownAdapterError(f"unknown: {weights}")
        self.active = dict(weights or {})


class MixingEngine(FakeEngine):
    """One that mixes adapters in a batch, but for those whose text is "german"."""

    async def why_not(self, weights):
        return "it is odd" if any(self.held[name] == "german" for name in weights) else ""

    @asynccontextmanager
    async def riding(self, weights):
        yield carried(weights, {name: self.held[name] for name in weights})


class FakeServer:
    """The application within: answers with what is active, in pieces, after `seconds`."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.requests: list[dict] = []

    async def __call__(self, scope, receive, send):
        message = await receive()
        request = json.loads(message["body"] or b"{}")
        headers = dict(scope["headers"])
        if b"content-length" in headers:
            assert int(headers[b"content-length"]) == len(message["body"])
        self.requests.append({"path": scope["path"], **request})
        self.engine.running += 1
        listening = asyncio.ensure_future(receive())
        try:
            done, _ = await asyncio.wait({listening}, timeout=request.get("seconds", 0))
            if done:
                assert listening.result()["type"] == "http.disconnect"
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(2):
                own = carrying.get(None)
                said = self.engine.active if own is None else {own.value: own.salt}
                active = json.dumps(said).encode() + b"\n"
                await send({"type": "http.response.body", "body": active, "more_body": True})
                await asyncio.sleep(request.get("seconds", 0))
            await send({"type": "http.response.body", "body": b""})
        finally:
            listening.cancel()
            self.engine.running -= 1


async def post(app, path, value, *, leaves=None, method="POST", parts=1):
    """Status and body of a request; a client that `leaves` goes away after so many seconds."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    cut = [data[i * len(data) // parts : (i + 1) * len(data) // parts] for i in range(parts)]
    pending = [
        {"type": "http.request", "body": part, "more_body": i + 1 < parts}
        for i, part in enumerate(cut)
    ]
    sent, never = [], asyncio.get_running_loop().create_future()

    async def receive():
        if pending:
            return pending.pop(0)
        if leaves is None:
            await never
        await asyncio.sleep(leaves)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(data)).encode())]
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": headers}
    await app(scope, receive, send)
    if not sent:
        return None, b""
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
