# SPDX-License-Identifier: Apache-2.0
"""Prepare what ``save_pretrained`` writes: an adapter's tensors, whole, and its configuration.

Positions change after the configuration has chosen them: a state dict of another run is loaded, a
checkpoint resumed. So nothing that depends on them is remembered: a configuration is described by
the layers that have its adapter, when it is saved (`describe`). Adapters are also taken out to be
fused into a further one (`fused_adapter`).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD, fingerprint_fields
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, MaskError, did_you_mean
from shira.fusing import METHODS, fill_to_rank, fuse
from shira.fusing.result import FUSED
from shira.ops.gaps import unpack
from shira.store.config import SHAPES_FIELD, common_rank
from shira.store.names import (
    INDICES,
    VALUES,
    gathered,
    is_partitioned,
    is_sharded,
    name_of_layer,
    own_names,
    whole,
)
from shira.tuner.base_layer import base_values, stored_weight, values_at, with_originals
from shira.tuner.config import ShiraConfig
from shira.tuner.indices import digest_of
from shira.tuner.layer import ShiraLayer
from shira.tuner.masking import SupportTable
from shira.tuner.parameter import ParameterLayer
from shira.tuner.targets import name_exactly

Known = Mapping[str, tuple[str, dict[str, Any]]]
"""``{parameter name: (digest of the positions, what is recorded of the base under them)}``"""

COMBINATIONS = {"linear": "sum", "dare_linear": "dare", **{name: name for name in METHODS}}
"""PEFT's names of combination types, and ours, to methods of `shira.fuse`."""

_OF_THE_BASE = (FINGERPRINT_FIELD, ROUNDED_FIELD)


def layers_of(model: nn.Module, adapter_name: str | None = None) -> dict[str, ShiraLayer]:
    """Return the layers that have an adapter, or any, by the names that PEFT has for them.

    Those that are tied to one of them are not among them.
    """
    return {
        path: layer
        for path, layer in _all_layers(model).items()
        if layer.tied_to is None and adapter_name in (None, *layer.shira_weight)
    }


def _all_layers(model: nn.Module) -> dict[str, ShiraLayer]:
    return {
        path_in_state(path): module
        for path, module in model.named_modules()
        if isinstance(module, ShiraLayer)
    }


def tied_weights(model: nn.Module, layers: Mapping[str, ShiraLayer]) -> dict[str, str]:
    """Return ``{parameter name: that of the parameter it is one with}``, of these layers."""
    names = {id(layer): name_of_layer(path, layer) for path, layer in layers.items()}
    return {
        name_of_layer(path, layer): names[id(layer.tied_to)]
        for path, layer in _all_layers(model).items()
        if id(layer.tied_to) in names
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

    Of weights of which this process has a part only, ``known`` says what is known; with ``gather``
    they are read, weight by weight, which is a collective call. Without such an adapter: ``{}``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    prints: dict[str, dict[str, Any]] = {field: {} for field in _OF_THE_BASE}
    as_chosen = as_budgeted = True
    layers = layers_of(model, adapter_name)
    for path, layer in layers.items():
        name, support = name_of_layer(path, layer), layer.support(adapter_name)
        shapes[name], counts[name] = support.shape, support.nnz
        digest = digest_of(support)
        unchanged = layer.chosen.get(adapter_name) == digest
        as_chosen &= unchanged
        k = None
        with suppress(MaskError):
            k = config.entries(support.shape, config.rank_of(name), name)
        # with rows of tokens, the positions that it chose are the budget
        as_budgeted &= k == support.nnz or (unchanged and bool(config.trainable_token_indices))
        part = is_sharded(stored_weight(layer))  # such are read together, or not at all
        values = base_values(layer, support, gather) if gather or not part else None
        hidden = layer.quantization_backend is not None or (part and not layer.base_reloaded)
        found: dict[str, Any] = {}
        if values is not None:
            found = fingerprint_fields({name: values})
        elif known.get(name, ("",))[0] == digest:
            found = known[name][1]
        elif unchanged and hidden:
            found = {field: getattr(config, field, None) for field in _OF_THE_BASE}
        for field, told in found.items():
            prints[field] |= {name: told[name]} if told and name in told else {}
    if not shapes:
        return {}
    fields: dict[str, Any] = {
        SHAPES_FIELD: {name: list(shape) for name, shape in shapes.items()},
        **{field: told or None for field, told in prints.items() if hasattr(config, field)},
        "tied_weights": tied_weights(model, layers) or None,
    }
    if not as_chosen:
        fields |= {"random_seed": None, "mask_slot": 0}
    if not as_budgeted:
        r = common_rank(shapes, counts, None, config.target_parameters)
        fields |= {"r": r, "density": None, "rank_pattern": {}}
    return fields


def watch(
    config: ShiraConfig, model: nn.Module, adapter_name: str, known: Known = MappingProxyType({})
) -> None:
    """Have a configuration described by an adapter, as long as its model is there.

    A configuration that several adapters share is described by the latest.
    """
    config._describe, config._described = describe, (weakref.ref(model), adapter_name, known)


def whole_state(
    model: nn.Module, config: ShiraConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a state dict by the model's own names, with an adapter in it that is whole.

    The configuration is described by this adapter from then on. A collective call where the state
    dict is that of a sharded model (FSDP2, ZeRO-3); none where the caller has gathered it already,
    as Accelerate and Trainer do.
    """
    if is_elsewhere(state_dict):
        return state_dict
    state_dict = by_own_names(model, state_dict)
    layers = layers_of(model, adapter_name)
    keys = {f"{path}.{VALUES}.{adapter_name}" for path in layers}
    for key in sorted(keys - state_dict.keys()):
        like = min((given for given in state_dict if VALUES in given), default=None)
        example = f" (the adapter's names in this one are like {like!r})" if like else ""
        raise AdapterError(
            f"the state dict has no {key!r}, so adapter {adapter_name!r} cannot be saved from it: "
            f"pass that of the whole model{example}"
        )
    kept = f".modules_to_save.{adapter_name}."
    own = {path_in_state(name): parameter for name, parameter in model.named_parameters()}
    parts = {
        key: own[key]
        for key, tensor in state_dict.items()
        if (key in keys or kept in key) and not tensor.numel() and key in own
        if is_partitioned(own[key])
    }
    with gathered(parts.values()):
        state_dict |= {key: parameter.detach().clone() for key, parameter in parts.items()}
    for key in [key for key in state_dict if kept in key]:
        state_dict[key] = whole(state_dict[key])
    known = {}
    for path, layer in layers.items():
        value_key, index_key = (f"{path}.{kind}.{adapter_name}" for kind in (VALUES, INDICES))
        support = layer.support(adapter_name)
        if is_sharded(weight := stored_weight(layer)):
            name = name_of_layer(path, layer)
            if value_key in parts:
                values = base_values(layer, support, gather=True)
            else:
                weight = state_dict.get(f"{path}.{layer._key_of_base}")
                values = values_at(whole(weight), support) if isinstance(weight, Tensor) else None
            if values is not None:
                known[name] = digest_of(support), fingerprint_fields({name: values})
        state_dict[value_key] = whole(state_dict[value_key])
        positions = layer.shira_indices[adapter_name]
        # as they are kept, if this is no state dict but a list of buffers
        given = unpack(state_dict.get(index_key, positions), layer.weight_shape)
        fits = state_dict[value_key].shape == positions.shape[1:]
        if not fits or not torch.equal(given.to(positions), positions):
            raise AdapterError(
                f"{index_key!r} of the state dict are not the positions that the model's adapter "
                f"{adapter_name!r} has; load the state dict into the model first, and save that"
            )
        state_dict[index_key] = given
    getters = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    embeddings = [get() for get in getters if callable(get)]
    for path, layer in layers.items():  # PEFT saves a copy of the base's embeddings too
        if any(layer is embedding for embedding in embeddings):
            with_originals(state_dict, f"{path}.base_layer.weight", layer)
    for path, layer in _all_layers(model).items():
        if layer.tied_to is not None:  # the owner's is saved
            state_dict.pop(f"{path}.base_layer.weight", None)
    watch(config, model, adapter_name, known)
    return state_dict


def by_own_names(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict, perhaps of another wrapping, with PEFT's names in this one."""
    modules = [
        path_in_state(path)
        for path, module in model.named_modules()
        if isinstance(module, (ShiraLayer, AuxiliaryTrainingWrapper))
    ]
    names, inside = own_names(state_dict, modules), _stored_names(model)

    def named(key: str) -> str:
        name = names.get(key, key)
        stem, _, adapter = name.rpartition(".")  # a file has no adapter's name
        own = f"{inside[stem]}.{adapter}" if stem in inside else name
        return inside.get(name, own)

    return {named(key): tensor for key, tensor in state_dict.items()}


def _stored_names(model: nn.Module, adapter_name: str | None = None) -> dict[str, str]:
    """Return ``{name in a file: name in the model}`` of values and positions, where they differ."""
    names: dict[str, str] = {}
    wrappers = [
        path for path, layer in layers_of(model).items() if isinstance(layer, ParameterLayer)
    ]
    for path, layer in layers_of(model, adapter_name).items():
        module = path
        for wrapper in reversed(wrappers):  # those inside first
            if module.startswith(f"{wrapper}.base_layer"):
                module = wrapper + module.removeprefix(f"{wrapper}.base_layer")
        if isinstance(layer, ParameterLayer):
            module = f"{module}.{layer.parameter_name}"
        if module != path:
            names |= {f"{module}.{kind}": f"{path}.{kind}" for kind in (VALUES, INDICES)}
    return names


def keys_in_file(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the names in a file of values and positions of parameters: ``{model's: file's}``.

    Wrappers stand around wrappers in the model, and around a module with layers. A file names the
    parameter, ``...mlp.experts.down_proj.shira_weight``, and a layer as the base model does.
    """
    found = _stored_names(model, adapter_name).items()
    return {f"{own}.{adapter_name}": f"{stored}.{adapter_name}" for stored, own in found}


def path_in_state(path: str) -> str:
    """Return how PEFT calls a module of a model that FSDP has wrapped as a whole."""
    return path.removeprefix("_fsdp_wrapped_module.")


def is_elsewhere(state_dict: dict[str, Any]) -> bool:
    """Return whether a state dict is empty because another process holds it."""
    other = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    return other and not state_dict


def in_few_bytes(state_dict: dict[str, Tensor], save_dtype: str | None) -> dict[str, Tensor]:
    """Return an adapter's state dict with indices in int16 where they fit, values in a dtype.

    PEFT, stock PEFT too, casts back what it loads.
    """
    result = {}
    for key, tensor in state_dict.items():
        if INDICES in key and tensor.dtype == torch.int32:
            fits = not tensor.numel() or int(tensor.max()) < 2**15
            tensor = tensor.to(torch.int16) if fits else tensor
        elif VALUES in key and save_dtype is not None:
            stored = tensor.to(getattr(torch, save_dtype))
            if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(tensor).all()):
                raise AdapterError(
                    f"{key}: a value of {float(tensor.abs().max()):.6g} is not finite in "
                    f"{save_dtype}; set the config's save_dtype to None or 'bfloat16'"
                )
            tensor = stored
        result[key] = tensor
    return result


def fused_adapter(
    model: nn.Module,
    adapter_names: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    **options: Any,
) -> tuple[Adapter, ShiraConfig]:
    """Combine adapters of a model, times what `set_scale` has set in each layer.

    Modules that they train whole are left out. The configuration is that under which the result,
    a sparse adapter, is put into the model.
    """
    if combination_type not in COMBINATIONS:
        hint = (
            " Those with factors ('svd', 'cat') are LoRA's; here 'linear' is the exact sum."
            if combination_type == "cat" or combination_type.endswith("svd")
            else did_you_mean(combination_type, COMBINATIONS)
        )
        raise ConfigError(
            f"Invalid combination_type: {combination_type!r}; there are {', '.join(COMBINATIONS)}."
            f"{hint}"
        )
    fused = fuse(
        [_scaled(model, name) for name in adapter_names],
        weights,
        COMBINATIONS[combination_type],
        check_base=False,  # they stand in one model
        names=[f"adapter {name!r}" for name in adapter_names],
        **options,
    )
    r = fused.metadata.get("r")
    if fused.metadata.get("mask_type") == FUSED or not isinstance(r, int):
        r, fused = fill_to_rank(fused)
    fields = {field.name for field in dataclasses.fields(ShiraConfig)} - {*_OF_THE_BASE}
    known = {name: value for name, value in fused.metadata.items() if name in fields}
    config = ShiraConfig(**known | {"r": r, "inference_mode": True, "modules_to_save": None})
    config.mask_fn = SupportTable({name: delta.support for name, delta in fused.items()})
    config.trainable_token_indices = None  # such rows are entries like others
    config.ensure_weight_tying = bool(tied_weights(model, layers_of(model)))
    name_exactly(config, model, set(fused))
    return fused, config


def _scaled(model: nn.Module, adapter_name: str) -> Adapter:
    adapter = Adapter.from_model(model, adapter_name)
    deltas = {}
    for path, layer in layers_of(model, adapter_name).items():
        name = name_of_layer(path, layer)
        values = adapter[name].values * layer.scaling[adapter_name]
        deltas[name] = SparseDelta(adapter[name].support, values)
    return Adapter(deltas, adapter.metadata)
