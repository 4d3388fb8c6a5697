# SPDX-License-Identifier: Apache-2.0
"""The trainer's side of weight transfer: `ValueSender` sends an update as k values.

::

    sender = ValueSender(client, adapter, name="policy", path="policy", port=29510, workers=2)
    for step in range(steps):
        ...
        sender.send(Adapter.from_model(model))   # the same positions, new values

``client`` has the four methods of vLLM's ``VLLMWeightSyncClient``; for ``vllm.LLM`` in this process
there is `LLMClient`. The engine is started with ``worker_extension_cls`` of `shira.serve.vllm` and
``weight_transfer_config={"backend": "shira"}``, and holds the adapter already. Imports no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from shira.delta import SparseDelta
from shira.errors import ServeError
from shira.serve.fixed_support import FixedSupport
from shira.serve.messages import located, named
from shira.serve.ranks import Failure
from shira.serve.values_wire import Wire, check_ends


class SyncClient(Protocol):
    """What drives the engine; the shape is vLLM's ``VLLMWeightSyncClient``.

    No request may run between start and finish, and finish must drop the prefix cache: its blocks
    were computed with the old values.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Called once."""

    def start_weight_update(self) -> None:
        """Called before each update."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Runs while the values are on their way."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Called after each update."""


class LLMClient:
    """A `SyncClient` of a ``vllm.LLM`` in this process.

    Args:
        llm: The engine.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """As the protocol says."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """As the protocol says.

        Raises:
            ServeError: If requests are unfinished; nothing has changed.
        """
        if self.llm.llm_engine.has_unfinished_requests():
            raise ServeError("requests are unfinished: wait_for_completion() before an update")
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the protocol says."""
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """As the protocol says.

        Raises:
            ServeError: If vLLM did not drop its prefix cache.
        """
        self.llm.finish_weight_update(weight_version)
        if not self.llm.reset_prefix_cache():
            raise ServeError(
                "vLLM did not drop its prefix cache (blocks are in use): answers may be stale"
            )


class ValueSender:
    """Sends new values of one adapter whose positions stay.

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
            ServeError: If the engine could not; it has the values of before.
        """
        values = self.support.flat(adapter, dtype)
        info = {"nnz": values.numel(), "dtype": str(values.dtype).removeprefix("torch.")}
        self.client.start_weight_update()
        with ThreadPoolExecutor(max_workers=1) as beside:
            receiving = beside.submit(self.client.update_weights, info)
            self._wire.send(values)
            try:
                _check(self._wire)
            finally:
                receiving.result()
                self.client.finish_weight_update()
        return values.numel() * values.itemsize


def _check(wire: Wire) -> None:
    for worker, text in enumerate(wire.answers()):
        if text is not None:
            kind, _, message = text.partition(": ")
            raise Failure(kind, message, worker).error(several=False)
