# SPDX-License-Identifier: Apache-2.0
"""Read a saved configuration's description of its adapter off the layers, when it is saved.

Positions change after the configuration has chosen them: a state dict of another run is loaded, a
checkpoint resumed. So nothing that depends on them is remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD, fingerprint_fields
from shira.errors import MaskError
from shira.store.names import base_module_name, weight_name
from shira.store.patterns import matching
from shira.store.peft_config import common_rank
from shira.store.sharded import is_sharded, whole
from shira.support import Support
from shira.tuner.base_layer import stored_weight
from shira.tuner.indices import digest_of
from shira.tuner.layer import ShiraLayer
from shira.tuner.masking import entries
from shira.tuner.undo import base_values, values_at

if TYPE_CHECKING:
    from shira.tuner.config import ShiraConfig

Known = Mapping[str, tuple[str, dict[str, Any]]]
"""``{parameter name: (digest of the positions, what is recorded of the base under them)}``"""

_OF_THE_BASE = (FINGERPRINT_FIELD, ROUNDED_FIELD)


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, ShiraLayer]:
    """Return the layers that have an adapter, by the model's own names."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ShiraLayer) and adapter_name in module.shira_weight
    }


def describe(
    config: ShiraConfig,
    model: nn.Module,
    adapter_name: str,
    known: Known = MappingProxyType({}),
    gather: bool = False,
) -> dict[str, Any]:
    """Return the fields of a configuration that its adapter's positions and base decide.

    ``mask_type`` stays what was asked for. A seed and a slot are those of the positions, or are not
    given; the budget is that of the positions, as ``r`` and ``density`` say it or, where they do
    not, as the nearest ``r``.

    Args:
        config: Of the adapter.
        model: With the adapter's layers.
        adapter_name: Its name.
        known: What is known of weights of which this process has a part only.
        gather: Read such weights, weight by weight; a collective call.

    Returns:
        Empty if the model has no such adapter.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    prints: dict[str, dict[str, Any]] = {field: {} for field in _OF_THE_BASE}
    as_chosen = as_budgeted = True
    for path, layer in layers_of(model, adapter_name).items():
        module = base_module_name(path)
        name, support = weight_name(module), layer.support(adapter_name)
        shapes[name], counts[name] = support.shape, support.nnz
        digest = digest_of(support)
        unchanged = layer.chosen.get(adapter_name) == digest
        as_chosen &= unchanged
        as_budgeted &= _budget(config, module, support.shape) == support.nnz
        found = recorded_of(layer, name, support, gather)
        if found is None and known.get(name, ("",))[0] == digest:
            found = known[name][1]
        elif found is None and unchanged and _is_as_recorded(layer):
            found = {field: getattr(config, field, None) for field in _OF_THE_BASE}
        for field, told in (found or {}).items():
            prints[field] |= {name: told[name]} if name in (told or {}) else {}
    if not shapes:
        return {}
    fields: dict[str, Any] = {
        "shira_shapes": {name: list(shape) for name, shape in shapes.items()},
        **{field: told or None for field, told in prints.items() if hasattr(config, field)},
    }
    if not as_chosen:
        fields |= {"random_seed": None, "mask_slot": 0}
    if not as_budgeted:
        fields |= {"r": common_rank(shapes, counts, None), "density": None, "rank_pattern": {}}
    return fields


def watch(
    config: ShiraConfig,
    model: nn.Module,
    adapter_name: str,
    known: Known = MappingProxyType({}),
) -> None:
    """Have a configuration described by an adapter, as long as its model is there.

    A configuration that several adapters share is described by the latest.
    """
    config._describe = _Watch(weakref.ref(model), adapter_name, known)


class _Watch:
    def __init__(self, model: weakref.ref[nn.Module], adapter_name: str, known: Known) -> None:
        self.model, self.adapter_name, self.known = model, adapter_name, known

    def __call__(self, config: ShiraConfig) -> dict[str, Any]:
        model = self.model()
        return {} if model is None else describe(config, model, self.adapter_name, self.known)


def recorded_of(
    layer: nn.Module, name: str, support: Support, gather: bool = False
) -> dict[str, Any] | None:
    """Return what is recorded of the base under some entries; None if it cannot be read here.

    Args:
        layer: The base layer, or an adapted one.
        name: The parameter's.
        support: On its weight.
        gather: Read also a weight of which this process has a part only; a collective call.
    """
    if not gather and is_sharded(stored_weight(layer)):
        return None
    values = base_values(layer, support, gather)
    return None if values is None else fingerprint_fields({name: values})


def recorded_in(
    state_dict: Mapping[str, Any], path: str, name: str, support: Support
) -> dict[str, Any] | None:
    """Return what is recorded of the base under some entries as a state dict has it.

    A collective call if that holds a part as well.

    Args:
        state_dict: By the model's own names.
        path: Of the adapted layer.
        name: The parameter's.
        support: On its weight.
    """
    weight = state_dict.get(f"{path}.base_layer.weight")
    values = values_at(whole(weight), support) if isinstance(weight, Tensor) else None
    return None if values is None else fingerprint_fields({name: values})


def _is_as_recorded(layer: ShiraLayer) -> bool:
    """Return whether no state dict was loaded into the base since its adapters were added."""
    packed = layer.quantization_backend is not None
    return packed or (is_sharded(stored_weight(layer)) and not layer.base_reloaded)


def _budget(config: ShiraConfig, module: str, shape: tuple[int, ...]) -> int | None:
    """Return the number of entries that the configuration gives a weight."""
    try:
        return entries(config, shape, matching(config.rank_pattern, module, config.r), module)
    except MaskError:
        return None
