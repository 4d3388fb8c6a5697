# SPDX-License-Identifier: Apache-2.0
"""What a saved configuration says of its adapter, read off the layers when it is saved.

Positions change after the configuration has chosen them: a state dict of another run is loaded, a
checkpoint resumed. So nothing that depends on them is remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from shira.delta import fingerprint
from shira.errors import MaskError
from shira.store.names import base_module_name, weight_name
from shira.store.peft_config import common_rank
from shira.store.sharded import is_sharded, whole
from shira.support import Support
from shira.tuner.base_values import base_of, base_values, values_at
from shira.tuner.indices import digest_of
from shira.tuner.layer import ShiraLayer
from shira.tuner.masking import entries

if TYPE_CHECKING:
    from shira.tuner.config import ShiraConfig

Fingerprints = Mapping[str, tuple[str, str]]
"""``{parameter name: (digest of the positions, fingerprint of the base under them)}``"""


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
    known: Fingerprints = MappingProxyType({}),
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
        known: Fingerprints for weights of which this process has a part only.
        gather: Read such weights, weight by weight; a collective call.

    Returns:
        Empty if the model has no such adapter.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    prints: dict[str, str] = {}
    as_chosen = as_budgeted = True
    for path, layer in layers_of(model, adapter_name).items():
        module = base_module_name(path)
        name, support = weight_name(module), layer.support(adapter_name)
        shapes[name], counts[name] = support.shape, support.nnz
        digest = digest_of(support)
        unchanged = layer.chosen.get(adapter_name) == digest
        as_chosen &= unchanged
        as_budgeted &= _budget(config, module, support.shape) == support.nnz
        found = fingerprint_of(layer, support, gather)
        if found is None and known.get(name, ("",))[0] == digest:
            found = known[name][1]
        elif found is None and unchanged and layer.quantization_backend is not None:
            found = (config.base_fingerprint or {}).get(name)  # of the base before it was packed
        if found is not None:
            prints[name] = found
    if not shapes:
        return {}
    fields: dict[str, Any] = {
        "shira_shapes": {name: list(shape) for name, shape in shapes.items()},
        "base_fingerprint": prints or None,
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
    known: Fingerprints = MappingProxyType({}),
) -> None:
    """Have a configuration described by an adapter, as long as its model is there.

    A configuration that several adapters share is described by the latest.
    """
    config._describe = _Watch(weakref.ref(model), adapter_name, known)


class _Watch:
    def __init__(
        self, model: weakref.ref[nn.Module], adapter_name: str, known: Fingerprints
    ) -> None:
        self.model, self.adapter_name, self.known = model, adapter_name, known

    def __call__(self, config: ShiraConfig) -> dict[str, Any]:
        model = self.model()
        return {} if model is None else describe(config, model, self.adapter_name, self.known)


def fingerprint_of(layer: nn.Module, support: Support, gather: bool = False) -> str | None:
    """Return the fingerprint of the base under some entries, or None if it cannot be read here."""
    weight: Tensor = base_of(layer).weight
    if is_sharded(weight) and not gather:
        return None
    values = base_values(layer, support, gather)
    return None if values is None else fingerprint(values)


def fingerprint_in(state_dict: Mapping[str, Any], path: str, support: Support) -> str | None:
    """Return the fingerprint of the base under some entries as a state dict has it.

    A collective call if that holds a part as well.

    Args:
        state_dict: By the model's own names.
        path: Of the adapted layer.
        support: On its weight.
    """
    weight = state_dict.get(f"{path}.base_layer.weight")
    values = values_at(whole(weight), support) if isinstance(weight, Tensor) else None
    return None if values is None else fingerprint(values)


def _budget(config: ShiraConfig, module: str, shape: tuple[int, ...]) -> int | None:
    """How many entries the configuration gives a weight."""
    pattern = get_pattern_key(list(config.rank_pattern), module)
    try:
        return entries(config, shape, config.rank_pattern.get(pattern, config.r), module)
    except MaskError:
        return None
