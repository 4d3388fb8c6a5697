# SPDX-License-Identifier: Apache-2.0
"""vLLM's weight transfer backend "shira": the worker's side of `shira.serve.value_sender`.

``weight_transfer_config={"backend": "shira"}`` beside the worker extension. `register` makes the
name known; vLLM calls it in every process through the entry point ``shira`` of the group
``vllm.general_plugins``. Methods do not raise: vLLM's executor would lose the other workers'
answers (see `shira.serve.vllm`). What went wrong travels back over the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from shira.adapter import Adapter
from shira.errors import ServeError
from shira.serve.route import Route
from shira.serve.value_sender import Wire

BACKEND = "shira"
_DTYPES = {"float32", "bfloat16", "float16", "float64"}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The adapter, and the trainer's address; see `ValueSender`."""

    adapter: str
    path: str
    support: str
    address: str
    port: int
    size: int
    timeout: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The values that are on their way."""

    nnz: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"values are one of {sorted(_DTYPES)}, not {self.dtype!r}")
        if not 0 <= self.nnz < 2**40:
            raise ValueError(f"{self.nnz} values cannot be")


class ShiraWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """One worker's end."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._wire: Wire | None = None
        self._route: Route | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Meet the trainer and agree on the positions."""
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._wire = Wire(
            init_info.address, init_info.port, rank + 1, init_info.size, init_info.timeout
        )
        self._answer(lambda: self._find_route(init_info))

    def start_weight_update(self) -> None:
        """Nothing: values are exchanged in place."""

    def finish_weight_update(self) -> None:
        """Nothing."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive values, and switch to them if the adapter is active."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive values as `update_weights` does."""
        if self._wire is None:
            raise RuntimeError("no trainer has met this worker: init_weight_transfer_engine first")
        values = self._wire.receive(update_info.nnz, getattr(torch, update_info.dtype))
        self._answer(lambda: self._update(values))

    def shutdown(self) -> None:
        """Leave the trainer."""
        self._wire = self._route = None

    def _find_route(self, info: InitInfo) -> None:
        from shira.serve.vllm import ADAPTERS, MIXED

        adapters = ADAPTERS.get(self.model)
        if adapters is None:
            raise ServeError(
                "this worker holds no adapters: start the engine with worker_extension_cls="
                "'shira.serve.vllm.ShiraWorkerExtension' and load the adapter first"
            )
        if adapters in MIXED:
            raise ServeError(
                "values are not sent to an engine that mixes adapters in a batch: its blocks in "
                "the prefix cache are told apart by what the adapters' files hold"
            )
        self._route = Route(adapters, info.adapter, lambda: Adapter.load(info.path), info.support)

    @torch.no_grad()
    def _update(self, values: torch.Tensor) -> None:
        if self._route is None:
            raise ServeError("trainer and worker have not agreed on positions")
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # steps in flight still read the weights
        self._route.update(values)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def _answer(self, step: Callable[[], None]) -> None:
        assert self._wire is not None
        try:
            step()
        except Exception as error:
            self._wire.answer(error)
        else:
            self._wire.answer(None)


def register() -> None:
    """Make the backend known to vLLM; once or more."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "shira.serve.vllm_transfer", "ShiraWeightTransferEngine"
        )
