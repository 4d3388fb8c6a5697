# SPDX-License-Identifier: Apache-2.0
"""`GradientWatch`: name adapters that the first backward pass did not reach in a warning, once.

Such as those of a layer that a model never calls, or whose weight is read in a way that hides it
from autograd. A model is watched from its injection to the end of its first backward pass, by hooks
on the values that take themselves off; after that nothing is left. Not under ``torch.compile``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shira.errors import listed
from shira.ops.product import runs_eagerly
from shira.tuner.layer import ShiraLayer


class GradientWatch:
    """The wait for the first backward pass of a model, whose layers hold it until then."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        layers = (m for m in model.modules() if isinstance(m, ShiraLayer) and m.tied_to is None)
        self._layers = weakref.WeakSet(layers)
        self._handles: dict[Any, Any] = {}
        self._reached: set[tuple[int, str]] = set()
        self._ending = False
        for layer in self._layers:
            if layer._gradient_watch is not None:
                layer._gradient_watch.stop()
            layer._gradient_watch = self

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model is not watched

    def use(
        self, layer: ShiraLayer, adapter_names: Sequence[str], values: Sequence[Tensor]
    ) -> None:
        """Note that adapters are about to be computed with, for a backward pass."""
        if not runs_eagerly(*values):
            self.stop()
            return
        if not self._handles:  # a pass that reaches no adapter at all is a first pass too
            model = self._model()
            for name, parameter in () if model is None else model.named_parameters():
                if parameter.requires_grad and "shira_weight." not in name and parameter.is_leaf:
                    self._handles[name] = parameter.register_hook(lambda _: self._await_end())
        for name, value in zip(adapter_names, values, strict=True):
            key = (id(layer), name)
            if value.requires_grad and key not in self._handles:
                self._handles[key] = value.register_hook(lambda _, key=key: self._reach(key))
        # A forward within a backward pass is that of a checkpoint, whose own pass ends earlier.
        if torch._C._current_graph_task_id() != -1:
            self._await_end()

    def stop(self) -> None:
        """Take everything off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        for layer in self._layers:
            if layer._gradient_watch is self:
                layer._gradient_watch = None

    def _reach(self, key: tuple[int, str]) -> None:
        self._reached.add(key)
        self._await_end()

    def _await_end(self) -> None:
        if not self._ending:
            self._ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]

    def _end(self) -> None:
        idle: dict[str, list[str]] = {}
        for layer in self._layers:
            for name in layer._in_effect():
                reached = (id(layer), name) in self._reached
                if layer.shira_weight[name].requires_grad and not reached:
                    idle.setdefault(name, []).append(layer.weight_name)
        self.stop()
        for name, weights in idle.items():
            warnings.warn(
                f"adapter {name!r}: no gradient reached {len(weights)} of its layers in the first "
                f"backward pass: {listed(sorted(weights))}. Either they were not "
                "called (an expert without tokens, an unused part of the model), or the model uses "
                "their weights in a way that autograd does not see; what is not reached is not "
                "trained",
                stacklevel=2,
            )
