# SPDX-License-Identifier: Apache-2.0
"""Modules that share one weight, adapted once: the `Tied` layers.

Of the modules that share a weight (a language model's embedding and its head), the first one in the
model has the adapters: it is their owner. Each of the others becomes a `Tied` layer, which has
nothing of its own but its product: values, positions, scales and what is merged are the owner's. So
each of them computes with the same adapted weight, the gradient of the values is the sum over all
of them, and a merge writes into the one weight once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shira.errors import MergeError
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import LAYERS, layer_class_of


def _of_owner(name: str) -> Any:
    return property(lambda layer: getattr(layer.tied_to, name))


class Tied(ShiraLayer):
    """The part of a layer type that has its adapters in another layer, of the same weight.

    Args:
        base_layer: The module that shares the owner's weight.
        owner: The layer that has the adapters.
    """

    shira_weight = _of_owner("shira_weight")
    shira_indices = _of_owner("shira_indices")
    r = _of_owner("r")
    scaling = _of_owner("scaling")
    chosen = _of_owner("chosen")
    merged_adapters = _of_owner("merged_adapters")
    _undo = _of_owner("_undo")

    def __init__(self, base_layer: nn.Module, owner: ShiraLayer) -> None:
        nn.Module.__init__(self)
        self.__dict__["tied_to"] = owner  # no part of this module: its tensors are not here twice
        self._wrap(base_layer)
        self._active_adapter = owner._active_adapter
        self._disable_adapters = owner._disable_adapters
        self.training = base_layer.training

    def _owner(self) -> ShiraLayer:
        return self.tied_to  # type: ignore[return-value]

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the owner has what is new."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor on an adapter's deltas, in all layers of the weight."""
        self._owner().set_scale(adapter, scale)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters here; whether they train is the owner's.

        Args:
            enabled: Whether forwards are to use the active adapters.
        """
        self._disable_adapters = not enabled

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into the one weight, what is not merged there already; as `ShiraLayer.merge`."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if missing := [name for name in wanted if name not in self.merged_adapters]:
            self.check_mergeable(missing)
            self._owner().merge(safe_merge, missing)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """As `ShiraLayer.check_mergeable`; nor into a packed weight, which is two by then."""
        if self.quantization_backend is not None:
            raise MergeError(
                f"{self.weight_name}: adapters {list(adapter_names)} cannot be merged into a "
                "quantized weight that modules share (tied weights): packing it again would give "
                "each its own. Load the base model unquantized first, or keep them unmerged"
            )
        self._owner().check_mergeable(adapter_names)

    def unmerge(self) -> None:
        """Put the originals back, if something is merged."""
        if self.merged_adapters:
            self._owner().unmerge()

    def _in_effect(self) -> list[str]:
        return [] if self._disable_adapters else self._owner()._in_effect()

    def _in_use(
        self, adapter_names: Sequence[str], caller: ShiraLayer | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self._owner()._in_use(adapter_names, self)


_KINDS: dict[type[ShiraLayer], Any] = {
    kind: type(f"Tied{kind.__name__}", (Tied, kind), {"__module__": __name__}) for kind in LAYERS
}
globals().update({kind.__name__: kind for kind in _KINDS.values()})  # by which pickle finds them


def tied_layer(base_layer: nn.Module, owner: ShiraLayer) -> Tied:
    """Return the layer that stands for a further module of the weight that ``owner`` adapts."""
    layer_class: Any = layer_class_of(base_layer)
    tied: Tied = _KINDS[layer_class](base_layer, owner)
    return tied
