# SPDX-License-Identifier: Apache-2.0
"""New values for an adapter whose positions stay, from a trainer to the workers of an engine.

In an RL loop the mask stays and the values change at each update: k values are all there is to
send. Both sides order them alike and know the positions by one hash (`FixedSupport`), so that
values can never land elsewhere; they travel over a process group of their own (`Wire`)::

    sender = ValueSender(client, adapter, name="policy", path="policy", port=29510, workers=2)
    for step in range(steps):
        ...
        sender.send(Adapter.from_model(model))   # the same positions, new values

``client`` has the four methods of vLLM's ``VLLMWeightSyncClient``: `LLMClient` for ``vllm.LLM`` in
this process, `HTTPClient` for a server. The engine is started with ``worker_extension_cls`` of
`shira.serve.vllm` and ``weight_transfer_config={"backend": "shira"}``, and holds the adapter
already. The worker's side is `shira.serve.route.Route`. Imports no engine.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, ServeError
from shira.serve.messages import Failure, located, named
from shira.support import Support

_c10d: Any = dist  # torch has no types for what is used here

_ANSWER = 1024  # bytes: a status, and the text of an error


class FixedSupport:
    """The positions that a trainer and an engine agree on: parameters by name, entries by position.

    Attributes:
        supports: ``{parameter name: Support}``, by name.
        nnz: Entries in all, k.
        digest: Of names, shapes and positions: 32 hex digits. Equal exactly if the positions are.
    """

    def __init__(self, supports: Mapping[str, Support]) -> None:
        self.supports = {name: supports[name].to("cpu") for name in sorted(supports)}
        self.nnz = sum(support.nnz for support in self.supports.values())
        digest = hashlib.blake2b(digest_size=16)
        for name, support in self.supports.items():
            digest.update(f"{name}\0{support.shape}\0{support.nnz}\0".encode())
            raw = support.indices.to(torch.int64).contiguous()
            digest.update(raw.view(torch.uint8).numpy().data)
        self.digest = digest.hexdigest()

    @classmethod
    def of(cls, adapter: Mapping[str, SparseDelta]) -> FixedSupport:
        """Return the support of an adapter; `AdapterError` if it has whole tensors."""
        if isinstance(adapter, Adapter):
            adapter.require_sparse("values that travel alone")
        return cls({name: delta.support for name, delta in adapter.items()})

    def flat(self, adapter: Mapping[str, SparseDelta], dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of an adapter with this support: ``(k,)`` on the CPU.

        Args:
            adapter: Its deltas.
            dtype: Of the result; None: the widest of its values'.

        Raises:
            AdapterError: If its support is another, or a value is not finite (in that dtype).
        """
        if adapter.keys() != self.supports.keys():
            odd = sorted(adapter.keys() ^ self.supports.keys())[0]
            raise AdapterError(f"the support was fixed, but {odd!r} is in one of both alone")
        parts = []
        for name, support in self.supports.items():
            delta = adapter[name]
            if delta.support.to("cpu") != support:
                raise AdapterError(f"the support was fixed, but {name!r} has other positions now")
            parts.append(delta.values.detach().cpu())
        joined = torch.cat(parts) if parts else torch.empty(0)
        joined = joined if dtype is None else joined.to(dtype)
        check_finite(joined, "the adapter")
        return joined


def check_finite(values: Tensor, of: str) -> None:
    """Refuse values of which one is infinite or NaN (`AdapterError`)."""
    if not bool(torch.isfinite(values).all()):
        odd = int((~torch.isfinite(values)).sum())
        dtype = str(values.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{odd} of the {values.numel()} values of {of} are not finite in {dtype}"
        )


def check_ends(port: int, size: int, timeout: float) -> None:
    """Refuse a port, a number of processes or a timeout that is out of range (`ConfigError`)."""
    if not (0 < port < 2**16 and 1 < size <= 2**16 and 0 < timeout < 2**31):
        raise ConfigError(
            "port and workers are 1 to 65535, the timeout is a number of seconds above 0, not "
            f"{port!r}, {size - 1!r} and {timeout!r}"
        )


class Wire:
    """One end of the wire between a trainer and workers: k values out, one short answer back.

    A gloo process group beside whatever groups either side has. A message is the values and nothing
    else; what they are was agreed before. Every worker answers with a status and a text, because
    the engines' own calls lose a worker's error.

    Args:
        address: Host of the trainer.
        port: Free there.
        rank: 0 for the trainer, 1, 2, ... for the workers.
        size: Workers and the trainer.
        timeout: Seconds after which a missing partner is an error.

    Raises:
        ConfigError: If port, size or timeout is out of range.
        ServeError: If not everybody came in time.
    """

    def __init__(
        self, address: str, port: int, rank: int, size: int, timeout: float = 120.0
    ) -> None:
        check_ends(port, size, timeout)
        self.rank, self.size = rank, size
        limit = timedelta(seconds=timeout)
        try:
            self._store = _c10d.TCPStore(
                address, port, size, is_master=rank == 0, timeout=limit, wait_for_workers=False
            )
            prefixed = _c10d.PrefixStore("shira", self._store)
            self._group = _c10d.ProcessGroupGloo(prefixed, rank, size, limit)
            self._do(self._group.barrier())
        except Exception as error:
            raise ServeError(f"no wire between trainer and workers: {error}") from error

    def send(self, values: Tensor) -> None:
        """Send the trainer's values to every worker."""
        self._do(self._group.broadcast(values.contiguous(), 0))

    def receive(self, nnz: int, dtype: torch.dtype) -> Tensor:
        """Return the trainer's ``(nnz,)`` values, on a worker."""
        values = torch.empty(nnz, dtype=dtype)
        self._do(self._group.broadcast(values, 0))
        return values

    def answer(self, error: Exception | None) -> None:
        """Tell the trainer how it went, on a worker."""
        text = f"\1{type(error).__name__}: {error}" if error else ""
        padded = bytearray(text.encode()[:_ANSWER].ljust(_ANSWER, b"\0"))
        self._do(self._group.send([torch.frombuffer(padded, dtype=torch.uint8)], 0, self.rank))

    def answers(self) -> Sequence[str | None]:
        """Return for each worker None, or the text of its error, on the trainer."""
        found: list[str | None] = []
        for worker in range(1, self.size):
            padded = torch.empty(_ANSWER, dtype=torch.uint8)
            self._do(self._group.recv([padded], worker, worker))
            text = bytes(padded[1:].tolist()).rstrip(b"\0").decode(errors="replace")
            found.append(text if int(padded[0]) else None)
        return found

    def _do(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise ServeError(f"the wire between trainer and workers broke: {error}") from error


class SyncClient(Protocol):
    """The driver of the engine, with the methods of vLLM's ``VLLMWeightSyncClient``.

    No request may run between start and finish, and finish must drop the prefix cache: its blocks
    were computed with the old values.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers meet the trainer; called once."""

    def start_weight_update(self) -> None:
        """Stop requests; called before each update."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the workers receive; runs while the values are on their way."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Drop the prefix cache and go on; called after each update."""


class LLMClient:
    """A `SyncClient` of a ``vllm.LLM`` in this process.

    Args:
        llm: The engine.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers meet the trainer."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update.

        Raises:
            ServeError: If requests are unfinished; nothing has changed.
        """
        if self.llm.llm_engine.has_unfinished_requests():
            raise ServeError("requests are unfinished: wait_for_completion() before an update")
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the workers receive the values."""
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update.

        Raises:
            ServeError: If vLLM did not drop its prefix cache.
        """
        self.llm.finish_weight_update(weight_version)
        if not self.llm.reset_prefix_cache():
            raise ServeError(
                "vLLM did not drop its prefix cache (blocks are in use): answers may be stale"
            )


class HTTPClient:
    """A `SyncClient` of a ``vllm serve`` that runs with ``VLLM_SERVER_DEV_MODE=1``.

    An update waits for the requests that run, and those that come meanwhile wait for it.

    Args:
        url: Of the server, such as ``http://localhost:8000``.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str, timeout: float = 300.0) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers meet the trainer."""
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Let the requests that run come to their end, hold up others, and begin an update."""
        try:
            self._post("pause?mode=wait")  # of which the answer alone may have been lost
            self._post("start_weight_update")
        except BaseException:
            with suppress(ServeError):
                self._post("resume")
            raise

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the workers receive the values."""
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update, drop the prefix cache and let requests run again.

        Raises:
            ServeError: If vLLM did not drop its prefix cache; requests stay held up.
        """
        told = None if weight_version is None else {"weight_version": weight_version}
        self._post("finish_weight_update", told)
        if not self._post("reset_prefix_cache").get("success"):
            raise ServeError("vLLM did not drop its prefix cache: answers would be stale")
        self._post("resume")

    def _post(self, route: str, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
        said = ""
        request = urllib.request.Request(
            f"{self.url}/{route}",
            data=b"" if told is None else json.dumps(told).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return dict(json.loads(answer.read() or b"{}"))
        except urllib.error.HTTPError as error:
            with suppress(OSError, http.client.HTTPException):
                said = error.read().decode(errors="replace")[:_ANSWER]
            hint = " (does it run with VLLM_SERVER_DEV_MODE=1?)" if error.code == 404 else ""
            raise ServeError(f"{self.url}/{route} answers {error.code}{hint}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServeError(f"{self.url}/{route} does not answer: {error!r}") from error
        except (TypeError, ValueError) as error:
            raise ServeError(f"{self.url}/{route} answers with no JSON object: {error}") from error


class ValueSender:
    """Sender of new values for one adapter whose positions stay.

    Args:
        client: Drives the engine.
        adapter: The adapter that is trained; its positions are agreed on now.
        name: Under which the engine holds it.
        path: Where every worker can read an adapter with these positions (the file that the engine
            loaded).
        port: Free on this machine.
        workers: How many workers the engine has in all.
        address: This machine's, as the workers know it.
        timeout: Seconds to wait for them.

    Raises:
        AdapterError: If the engine holds other positions, or no such adapter.
        ConfigError: If port, workers or timeout is invalid.
        ServeError: If workers cannot be reached.
    """

    def __init__(
        self,
        client: SyncClient,
        adapter: Mapping[str, SparseDelta],
        *,
        name: str,
        path: str,
        port: int,
        workers: int,
        address: str = "127.0.0.1",
        timeout: float = 120.0,
    ) -> None:
        check_ends(port, workers + 1, timeout)
        self.client = client
        self.support = FixedSupport.of(adapter)
        info = {
            "adapter": named(name),
            "path": located(path),
            "support": self.support.digest,
            "address": address,
            "port": port,
            "size": workers + 1,
            "timeout": timeout,
        }
        with ThreadPoolExecutor(max_workers=1) as beside:
            ready = beside.submit(client.init_weight_transfer_engine, info)
            self._wire = Wire(address, port, 0, workers + 1, timeout)
            _check(self._wire)
            ready.result()

    def send(self, adapter: Mapping[str, SparseDelta], dtype: torch.dtype | None = None) -> int:
        """Make these values the adapter's in the engine, on all workers or on none.

        Args:
            adapter: With the positions that were agreed on.
            dtype: On the wire; None: the widest of its values'. The engine keeps them so.

        Returns:
            The bytes sent to each worker.

        Raises:
            AdapterError: If positions are others, or a value is not finite; nothing has changed.
            ServeError: If the engine could not; it has the values of before. If the wire broke, or
                the engine ended, what it has is not known: make another sender.
        """
        values = self.support.flat(adapter, dtype)
        info = {"nnz": values.numel(), "dtype": str(values.dtype).removeprefix("torch.")}
        self.client.start_weight_update()
        with ThreadPoolExecutor(max_workers=1) as beside:
            receiving = beside.submit(self.client.update_weights, info)
            try:
                self._wire.send(values)
                _check(self._wire)
            finally:
                try:
                    receiving.result()
                finally:
                    self.client.finish_weight_update()
        return values.numel() * values.itemsize


def _check(wire: Wire) -> None:
    for worker, text in enumerate(wire.answers()):
        if text is not None:
            kind, _, message = text.partition(": ")
            raise Failure(kind, message, worker).error()
