# SPDX-License-Identifier: Apache-2.0
"""Switching adapters under transformers' continuous batching: drain, switch, reset, resume.

`transformers`' own ``manager.pause()`` stops the loop between two steps and keeps everything: the
requests in flight, which would go on with other weights, and the cached blocks of prompts, from
which later requests with the same beginning would be answered by the adapter before. Both were
seen. So `AdapterBatching` lets the requests in flight end first, and empties the cache after::

    with model.continuous_batching_context_manager(generation_config=config) as manager:
        batching = AdapterBatching(manager, switch)  # a shira.Switch or a PEFT model
        batching.switch("french")
        request = batching.add_request(tokens)
        ...

Requests go in through it, so that none slips in during a switch; results come out of the manager
as always. No import of transformers: the manager is handed in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from shira.errors import (
    AdapterError,
    ConfigError,
    MissingDependencyError,
    UnknownAdapterError,
    did_you_mean,
)
from shira.serve.messages import Weights, wanted


class AdapterBatching:
    """A running manager of transformers whose model is switched between adapters.

    Args:
        manager: From ``model.continuous_batching_context_manager(...)`` or
            ``model.init_continuous_batching(...)``, started.
        adapters: What holds the adapters of the manager's model: a `shira.Switch` (or anything
            with its ``activate`` and ``deactivate``) or a PEFT model, whose merges are used.

    Raises:
        MissingDependencyError: If this transformers is too old for the manager to be paused.
        AdapterError: If ``adapters`` can do neither.
    """

    def __init__(self, manager: Any, adapters: Any) -> None:
        if not hasattr(manager, "pause"):
            raise MissingDependencyError(
                f"{type(manager).__name__} has no pause(): switching under continuous batching "
                "needs a newer transformers: pip install -U transformers"
            )
        self.manager = manager
        self._apply = _applier(adapters)
        self._gate = threading.Lock()  # held by a switch, and for each submission

    def add_request(self, input_ids: Sequence[int], **options: Any) -> str | None:
        """Add a request as the manager does; waits while a switch is under way."""
        with self._gate:
            return self.manager.add_request(list(input_ids), **options)  # type: ignore[no-any-return]

    def add_requests(self, inputs: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Add requests as the manager does; waits while a switch is under way."""
        with self._gate:
            lists = [list(ids) for ids in inputs]
            return self.manager.add_requests(lists, **options)  # type: ignore[no-any-return]

    def switch(self, selection: Weights, *, timeout: float | None = None) -> None:
        """Let the requests in flight end, switch, empty the cache, go on.

        Args:
            selection: An adapter's name, ``{name: scale}`` (PEFT models: all scales 1), or None
                for the base.
            timeout: Seconds to wait for the requests in flight; None: as long as they take.

        Raises:
            TimeoutError: If they took longer; nothing was switched.
            UnknownAdapterError: If there is no such adapter; the one before stays active.
            ConfigError: If the timeout is negative or NaN.
            RuntimeError: If the manager's loop is not running.
        """
        if timeout is not None and not timeout >= 0:
            raise ConfigError(f"the timeout is a number of seconds, 0 or more, not {timeout!r}")
        give_up = None if timeout is None else time.monotonic() + timeout
        with self._gate:
            idle_before = False
            while True:
                with self.manager.pause():
                    processor = self.manager.batch_processor
                    running = processor is not None and processor.has_pending_requests()
                    idle = self.manager.input_queue.empty() and not running
                    # Between its pauses the loop takes what came in out of the queue, and only
                    # after the pause puts it where it can be seen: only two in a row are proof.
                    if idle and idle_before:
                        try:
                            self._apply(selection)
                        finally:
                            self._reset_cache()
                        return
                idle_before = idle
                if give_up is not None and time.monotonic() > give_up:
                    raise TimeoutError(
                        f"requests were still running after {timeout} s; nothing was switched"
                    )
                if not idle:
                    time.sleep(_POLL_SECONDS)

    def _reset_cache(self) -> None:
        processor = self.manager.batch_processor
        if processor is not None:
            processor.cache.reset()


_POLL_SECONDS = 0.002


def _applier(adapters: Any) -> Callable[[Weights], None]:
    if callable(getattr(adapters, "merge_adapter", None)):
        return partial(_merge, adapters)
    if callable(getattr(adapters, "activate", None)):
        return lambda selection: (
            adapters.deactivate() if selection is None else adapters.activate(selection)
        )
    raise AdapterError(
        f"{type(adapters).__name__} can neither activate() nor merge_adapter(): hand in a "
        "shira.Switch or a PEFT model"
    )


def _merge(model: Any, selection: Weights) -> None:
    """Merge in a PEFT model, one at a time; all is checked before anything is undone."""
    scales = wanted(selection)
    if any(scale != 1 for scale in scales.values()):
        raise AdapterError(
            f"a PEFT model merges adapters at scale 1, not {scales}; "
            "set_scale() of its layers sets others, or use shira.Switch"
        )
    for name in scales:
        if name not in model.peft_config:
            raise UnknownAdapterError(
                f"there is no adapter {name!r}.{did_you_mean(name, model.peft_config)} "
                f"Known are {', '.join(sorted(model.peft_config))}"
            )
    # Undoing what is not merged is PEFT's warning, not an error; ask first.
    if any(getattr(module, "merged", False) for module in model.modules()):
        model.unmerge_adapter()
    if scales:
        model.base_model.enable_adapter_layers()
        model.merge_adapter(list(scales))
    else:
        model.base_model.disable_adapter_layers()
