# SPDX-License-Identifier: Apache-2.0
"""From a live model with SHiRA layers to an `Adapter`.

Layers are known by what they have, not by their class, so that this works for shira's layers and
for PEFT's own without importing either: dictionaries ``shira_weight`` (``(k,)`` each) and
``shira_indices`` (``(2, k)`` each) keyed by adapter name, and ``get_base_layer()``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

from torch import Tensor, nn

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, UnknownAdapterError, did_you_mean
from shira.store.config import SHAPES_FIELD, with_tied_fingerprints
from shira.store.header import in_order
from shira.store.names import (
    base_module_name,
    full_shape,
    gathered,
    name_of_layer,
    unwrapped,
    whole,
)
from shira.support import Support


def adapter_of_model(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """Return the named adapter of a model, copied to the CPU; see `Adapter.from_model`.

    The values are those that are saved: what `set_scale` set is a setting of the model, not of the
    adapter. Under FSDP2 and ZeRO-3 every rank has to call this, as values are gathered.

    Raises:
        UnknownAdapterError: If no layer has an adapter of this name.
        AdapterError: If a layer's entries are not possible.
    """
    root = unwrapped(model)
    layers = list(_shira_layers(root))
    known = {name for _, layer in layers for name in layer.shira_weight}
    layers = [(path, layer) for path, layer in layers if adapter_name in layer.shira_weight]
    deltas: dict[str, SparseDelta] = {}
    found: dict[int, SparseDelta] = {}  # layers that are tied to another have its values
    with gathered([layer.shira_weight[adapter_name] for _, layer in layers]):
        for path, layer in layers:
            name = name_of_layer(path, layer)
            values = layer.shira_weight[adapter_name]
            if id(values) not in found:
                found[id(values)] = _delta_of_layer(layer, name, adapter_name)
            deltas[name] = found[id(values)]
    tensors = dict(_whole_tensors(root, adapter_name))
    if not deltas:
        there = (
            f"it has {', '.join(map(repr, sorted(known)))}" if known else "it has no SHiRA layers"
        )
        raise UnknownAdapterError(
            f"the model has no SHiRA adapter {adapter_name!r}; {there}."
            f"{did_you_mean(adapter_name, known)}"
        )
    return Adapter(deltas, with_tied_fingerprints(_metadata(root, adapter_name)), tensors)


def _whole_tensors(root: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Copy the tensors that the adapter trains whole, by the base model's own names."""
    for path, module in root.named_modules():
        copies: Any = module._modules.get("modules_to_save")
        if "original_module" not in module._modules or not isinstance(copies, nn.ModuleDict):
            continue
        if adapter_name not in copies:
            continue
        copy = copies[adapter_name]
        if any(True for _ in _shira_layers(copy)):
            raise AdapterError(
                f"{path!r} is trained whole by adapter {adapter_name!r} (modules_to_save) and has "
                "SHiRA layers inside; leave it out of modules_to_save or of target_modules"
            )
        with gathered(copy.parameters()):
            for name, tensor in copy.state_dict().items():
                yield f"{base_module_name(path)}.{name}", _copied(tensor)


def _shira_layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in root.named_modules():
        if hasattr(module, "shira_weight") and hasattr(module, "shira_indices"):
            yield path, module


def _delta_of_layer(layer: Any, name: str, adapter_name: str) -> SparseDelta:
    shape = full_shape(getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight")))
    if adapter_name not in layer.shira_indices:
        raise AdapterError(f"{name!r}: adapter {adapter_name!r} has values but no indices")
    try:
        values = _copied(layer.shira_weight[adapter_name])
        coordinates, values = in_order(_copied(layer.shira_indices[adapter_name]), values)
        return SparseDelta(Support.from_coordinates(shape, coordinates), values)
    except (ValueError, NotImplementedError) as error:  # the latter of tensors on the meta device
        raise AdapterError(f"{name!r}: adapter {adapter_name!r}: {error}") from error


def _copied(tensor: Tensor) -> Tensor:
    return whole(tensor).to("cpu", copy=True)


def _metadata(root: nn.Module, adapter_name: str) -> dict[str, Any]:
    configs: Any = getattr(root, "peft_config", None)
    if not isinstance(configs, Mapping) or adapter_name not in configs:
        return {}
    config = configs[adapter_name]
    described = getattr(config, "to_dict_of", None)  # shira's own config looks at the layers
    fields = described(root, adapter_name) if described else config.to_dict()
    try:
        plain = json.loads(json.dumps(fields, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"the config of adapter {adapter_name!r} cannot be written as JSON: {error}"
        ) from error
    return {field: value for field, value in plain.items() if field != SHAPES_FIELD}


def _plain(value: Any) -> Any:
    """Return a value that JSON does not know in what it can hold."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return fspath(value) if isinstance(value, PathLike) else str(value).removeprefix("torch.")
