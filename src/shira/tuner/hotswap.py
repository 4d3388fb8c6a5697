# SPDX-License-Identifier: Apache-2.0
"""Exchange an adapter of a model for another one in a file, in a compiled model without compiling.

This is `peft.utils.hotswap` for SHiRA. PEFT's functions find these through the module's own names,
so that it does not matter which was imported first:

- ``prepare_model_for_compiled_hotswap(model, target_rank=r)`` gives each layer room for r (m + n)
  entries (`hold`, `pad`): what an adapter does not need is filled with entries of value zero, and
  positions are kept as int32, so that values and positions have one shape for every adapter.
- ``hotswap_adapter(model, path, adapter_name)`` checks the file as loading does, and then writes
  values and positions (`exchange`).

Compiled code takes both as inputs. What it was compiled for otherwise (a factor from `set_scale`,
which adapters are active, dtype, device) makes torch compile anew when it changes, as does a file
with more entries than there is room for in a model that was not prepared; prepared ones refuse it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, MergeError, UnknownAdapterError, listed
from shira.fusing import filled_up
from shira.store.names import VALUES, base_module_name, name_of_layer, unwrapped
from shira.support import matrix_shape
from shira.tuner.base_layer import stored_weight
from shira.tuner.config import ShiraConfig
from shira.tuner.indices import digest_of
from shira.tuner.layer import ShiraLayer
from shira.tuner.loading import checked_state, is_sparse, read_incoming
from shira.tuner.parameter import ParameterLayer
from shira.tuner.saving import keys_in_file, layers_of, watch

TARGETING = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("target_parameters", "ensure_weight_tying"),
)
"""Fields of a configuration that say which layers are adapted."""


def hold(model: nn.Module) -> bool:
    """Keep the positions of all adapters in a form that has one shape; tell whether there are any.

    They then take 8 bytes each.
    """
    layers = layers_of(model).values()
    for layer in layers:
        layer.shira_indices.hold()
    return bool(layers)


def pad(model: nn.Module, target_rank: int) -> bool:
    """Give all adapters room for ``target_rank * (m + n)`` entries of each m x n weight.

    Or as many as it has, if these are fewer. Tell whether there are adapters.

    Raises:
        ConfigError: If an adapter has more.
        MergeError: If one is merged.
    """
    parts = [(layer, name) for layer in layers_of(model).values() for name in layer.shira_weight]
    for layer, name in parts:
        _refuse_merged(layer, name)
        room, k = _room(layer, target_rank), layer.shira_weight[name].numel()
        if k > room:
            raise ConfigError(
                f"{layer.weight_name}: adapter {name!r} has {k} entries, and target_rank="
                f"{target_rank} makes room for {room}; the least rank with room for these is "
                f"{_least_rank(layer, k)}"
            )
    for layer, name in parts:
        values = layer.shira_weight[name]
        filled = filled_up(_delta(layer, name, values.detach()), _room(layer, target_rank))
        layer.shira_weight[name] = nn.Parameter(filled.values, values.requires_grad)
        layer.shira_indices[name] = filled.support.coordinates()
        layer.shira_indices.hold()
    return bool(parts)


def exchange(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any
) -> None:
    """Put another adapter in the place of one, under its name: all of it, or nothing.

    Layers that the new one has no entries in get zeros. Where a layer has room for as many entries
    or more, the values are written in place and the others are zeros.

    Args:
        model: The model, compiled or not.
        state_dict: PEFT's: ``...shira_weight.<adapter_name>``, ``...shira_indices.<adapter_name>``.
        adapter_name: The adapter that goes.
        config: The new one's; if read by ``from_pretrained``, its file is checked against the base.

    Raises:
        UnknownAdapterError: If there is no such adapter.
        AdapterError: If the new one has layers that this one lacks, or more entries than a prepared
            layer has room for, or one of the two trains whole modules.
        FileFormatError, WrongBaseError: If the file is damaged, or of another base.
        MergeError: If the adapter is merged.
    """
    inner = unwrapped(model)
    layers = layers_of(inner, adapter_name)
    if not layers:
        raise UnknownAdapterError(f"the model has no SHiRA adapter {adapter_name!r} to exchange")
    for layer in layers.values():
        _refuse_merged(layer, adapter_name)
    state_dict = _without_copies(state_dict, layers)
    old: Any = getattr(inner, "peft_config", {}).get(adapter_name)
    _refuse_whole(state_dict, old, config)
    inside = {key: own for own, key in keys_in_file(inner, adapter_name).items()}
    state_dict = {inside.get(key, key): tensor for key, tensor in state_dict.items()}
    _refuse_new_layers(state_dict, layers, adapter_name)
    base: Any = getattr(inner, "get_base_model", lambda: inner)()
    if isinstance(config, ShiraConfig):
        read_incoming(config, base)
    checked, supports = checked_state(inner, adapter_name, state_dict)
    new = []
    for path, layer in layers.items():
        delta = _delta(layer, adapter_name, torch.zeros_like(layer.shira_weight[adapter_name]))
        if path in supports:
            values = checked[f"{path}.{VALUES}.{adapter_name}"].to(delta.values)
            delta = SparseDelta(supports[path].to(values.device), values)
        new.append((layer, _fitted(layer, adapter_name, delta)))
    _write(new, adapter_name)
    if isinstance(old, ShiraConfig) and isinstance(config, ShiraConfig):
        names = ["inference_mode", "modules_to_save"]
        if layers.keys() - supports.keys():  # of zeros; saved, they are named by the old one alone
            names += TARGETING
            names += ["trainable_token_indices"] * (config.trainable_token_indices is None)
        kept = {name: getattr(old, name) for name in names}
        vars(old).update({**vars(config), **kept, "_source": None, "_where": None})
        watch(old, base, adapter_name)


def _write(new: list[tuple[ShiraLayer, SparseDelta]], adapter_name: str) -> None:
    before = [(layer, layer.shira_weight[adapter_name].detach().clone()) for layer, _ in new]
    dictionaries: list[Any] = [
        part
        for layer, _ in new
        for part in (layer.chosen, layer.shira_indices._buffers, layer.shira_weight._parameters)
    ]
    copies = [dict(part) for part in dictionaries]
    try:
        for layer, delta in new:
            values = layer.shira_weight[adapter_name]
            if values.shape == delta.values.shape:
                with torch.no_grad():
                    values.copy_(delta.values)
            else:
                layer.shira_weight[adapter_name] = nn.Parameter(delta.values, values.requires_grad)
            layer.shira_indices[adapter_name] = delta.support.coordinates()
            layer.chosen[adapter_name] = digest_of(delta.support)
            layer._positions_unchecked = True
    except BaseException:
        for part, copy in zip(dictionaries, copies, strict=True):
            part.update(copy)
        with torch.no_grad():
            for layer, values in before:
                layer.shira_weight[adapter_name].copy_(values)
        raise


def _fitted(layer: ShiraLayer, adapter_name: str, delta: SparseDelta) -> SparseDelta:
    """Return a delta that fills the room of a layer that was prepared; of others as it is."""
    if not layer.shira_indices.is_held:
        return delta
    room = layer.shira_weight[adapter_name].numel()
    if delta.nnz > room:
        raise AdapterError(
            f"{layer.weight_name}: the new adapter has {delta.nnz} entries, and {adapter_name!r} "
            f"has room for {room}; prepare the model before it is compiled with "
            f"target_rank={_least_rank(layer, delta.nnz)} or more "
            "(prepare_model_for_compiled_hotswap)"
        )
    return filled_up(delta, room)


def _delta(layer: ShiraLayer, adapter_name: str, values: Tensor) -> SparseDelta:
    return SparseDelta(layer.support(adapter_name).to(values.device), values)


def _room(layer: ShiraLayer, rank: int) -> int:
    return min(rank * _of_rank_one(layer), math.prod(layer.weight_shape))


def _least_rank(layer: ShiraLayer, k: int) -> int:
    return math.ceil(k / _of_rank_one(layer))


def _of_rank_one(layer: ShiraLayer) -> int:
    """Return the entries that r = 1 stands for, of experts those of each."""
    if isinstance(layer, ParameterLayer) and layer.num_experts > 1:
        return layer.num_experts * sum(layer.weight_shape[1:])
    return sum(matrix_shape(layer.weight_shape))


def _refuse_merged(layer: ShiraLayer, adapter_name: str) -> None:
    if adapter_name in layer.merged_adapters:
        raise MergeError(
            f"{layer.weight_name}: adapter {adapter_name!r} is merged; call unmerge_adapter() first"
        )


def _without_copies(
    state_dict: dict[str, Tensor], layers: dict[str, ShiraLayer]
) -> dict[str, Tensor]:
    """Leave out the copies of the base's embeddings that PEFT saves beside an adapter of them."""
    bases = {f"{path}.base_layer.weight": stored_weight(layer) for path, layer in layers.items()}

    def is_copy(key: str, tensor: Tensor) -> bool:
        base = bases.get(key)
        return base is not None and torch.equal(tensor.to(base), base)

    return {key: tensor for key, tensor in state_dict.items() if not is_copy(key, tensor)}


def _refuse_whole(state_dict: dict[str, Tensor], *configs: Any) -> None:
    whole = [key for key in state_dict if not is_sparse(key)]
    whole += [f"modules_to_save={m}" for c in configs if (m := getattr(c, "modules_to_save", None))]
    if whole:
        raise AdapterError(
            f"an adapter that trains whole modules is not exchanged in place ({listed(whole)}); "
            "load it beside the first with load_adapter, and switch with set_adapter"
        )


def _refuse_new_layers(
    state_dict: dict[str, Tensor], layers: dict[str, ShiraLayer], adapter_name: str
) -> None:
    there = {base_module_name(path) for path in layers}
    there |= {name_of_layer(path, layer) for path, layer in layers.items()}
    new = {base_module_name(key.rpartition(".shira_")[0]) for key in state_dict} - there
    if new:
        raise AdapterError(
            f"the new adapter has layers that adapter {adapter_name!r} of this model lacks: "
            f"{listed(sorted(new))}; load it beside the first with load_adapter, and switch with "
            "set_adapter"
        )
