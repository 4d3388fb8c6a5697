# SPDX-License-Identifier: Apache-2.0
"""Prepare what ``save_pretrained`` writes: all of an adapter (`whole_state`), in few bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from shira.errors import AdapterError
from shira.ops.packed import unpack
from shira.store.names import base_module_name, own_names, weight_name
from shira.store.peft_format import INDICES, VALUES
from shira.store.sharded import gathered, is_partitioned, is_sharded, whole
from shira.tuner.base_layer import stored_weight
from shira.tuner.config import ShiraConfig
from shira.tuner.describing import layers_of, recorded_in, recorded_of, watch
from shira.tuner.indices import digest_of
from shira.tuner.layer import ShiraLayer
from shira.tuner.undo import with_originals


def whole_state(
    model: nn.Module, config: ShiraConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a state dict by the model's own names, with an adapter in it that is whole.

    The configuration is described by this adapter from then on. A collective call where the state
    dict is that of a sharded model (FSDP2, ZeRO-3); none where the caller has gathered it already,
    as Accelerate and Trainer do.

    Args:
        model: With the adapter's layers.
        config: Of the adapter.
        adapter_name: Of the adapter.
        state_dict: Of the model; other wrappers may have put their names before or in the keys.

    Returns:
        Values, and modules that the adapter trains whole, in one piece; positions as PEFT has them.

    Raises:
        AdapterError: If the state dict lacks values of the adapter, or has other positions than the
            model.
    """
    if is_elsewhere(state_dict):
        return state_dict
    state_dict = by_own_names(model, state_dict)
    layers = {path_in_state(path): layer for path, layer in layers_of(model, adapter_name).items()}
    keys = {f"{path}.shira_weight.{adapter_name}": layer for path, layer in layers.items()}
    for key in keys:
        if key not in state_dict:
            raise AdapterError(
                f"the state dict has no {key!r}, so adapter {adapter_name!r} cannot be saved from "
                f"it: pass that of the whole model{_example_of(state_dict)}"
            )
    kept = f".modules_to_save.{adapter_name}."
    own = {key: layer.shira_weight[adapter_name] for key, layer in keys.items()}
    own |= {path_in_state(n): p for n, p in model.named_parameters() if kept in n}
    parts = {
        key: parameter
        for key, parameter in own.items()
        if is_partitioned(parameter) and key in state_dict and not state_dict[key].numel()
    }
    with gathered(parts.values()):
        state_dict |= {key: parameter.detach().clone() for key, parameter in parts.items()}
    for key in [key for key in state_dict if kept in key]:
        state_dict[key] = whole(state_dict[key])
    known = {}
    for path, layer in layers.items():
        value_key, index_key = (f"{path}.{kind}.{adapter_name}" for kind in (VALUES, INDICES))
        support = layer.support(adapter_name)
        if is_sharded(stored_weight(layer)):
            name = weight_name(base_module_name(path))
            found = (
                recorded_of(layer, name, support, gather=True)
                if value_key in parts
                else recorded_in(state_dict, path, name, support)
            )
            if found is not None:
                known[name] = digest_of(support), found
        state_dict[value_key] = whole(state_dict[value_key])
        positions = layer.shira_indices[adapter_name]
        # as they are kept, if this is no state dict but a list of buffers
        given = unpack(state_dict.get(index_key, positions), layer.weight_shape)
        if state_dict[value_key].shape != positions.shape[1:] or not torch.equal(
            given.to(positions), positions
        ):
            raise AdapterError(
                f"{index_key!r} of the state dict are not the positions that the model's adapter "
                f"{adapter_name!r} has; load the state dict into the model first, and save that"
            )
        state_dict[index_key] = given
    for path, layer in layers.items():  # PEFT saves a copy of the base's embeddings too
        if any(layer is embedding for embedding in _embeddings_of(model)):
            with_originals(state_dict, f"{path}.base_layer.weight", layer)
    watch(config, model, adapter_name, known)
    return state_dict


def _embeddings_of(model: nn.Module) -> list[Any]:
    found = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    return [get() for get in found if callable(get)]


def by_own_names(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with the names by which PEFT knows what belongs to adapters.

    Args:
        model: With adapters.
        state_dict: Perhaps of the same model in another wrapping.

    Raises:
        AdapterError: If two of its keys mean the same tensor.
    """
    modules = [
        path_in_state(path)
        for path, module in model.named_modules()
        if isinstance(module, (ShiraLayer, AuxiliaryTrainingWrapper))
    ]
    names = own_names(state_dict, modules)
    return {names.get(key, key): tensor for key, tensor in state_dict.items()}


def path_in_state(path: str) -> str:
    """Return how PEFT calls a module of a model that FSDP has wrapped as a whole."""
    return path.removeprefix("_fsdp_wrapped_module.")


def is_elsewhere(state_dict: dict[str, Any]) -> bool:
    """Return whether a state dict is empty because another process holds it."""
    other = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    return other and not state_dict


def _example_of(state_dict: dict[str, Any]) -> str:
    found = sorted(key for key in state_dict if "shira_weight" in key)[:1]
    return f" (the adapter's names in this one are like {found[0]!r})" if found else ""


def in_few_bytes(state_dict: dict[str, Tensor], save_dtype: str | None) -> dict[str, Tensor]:
    """An adapter's state dict as it is stored: PEFT, stock PEFT too, casts back what it loads.

    Args:
        state_dict: Values ``...shira_weight...`` and indices ``...shira_indices...``; other entries
            stay as they are.
        save_dtype: As in `ShiraConfig`.

    Returns:
        Indices in int16 where all of them fit, values in the dtype.

    Raises:
        AdapterError: If a value is not finite in the dtype.
    """
    result = {}
    for key, tensor in state_dict.items():
        if "shira_indices" in key and tensor.dtype == torch.int32:
            fits = not tensor.numel() or int(tensor.max()) < 2**15
            tensor = tensor.to(torch.int16) if fits else tensor
        elif "shira_weight" in key and save_dtype is not None:
            stored = tensor.to(getattr(torch, save_dtype))
            if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(tensor).all()):
                raise AdapterError(
                    f"{key}: a value of {float(tensor.abs().max()):.6g} is not finite in "
                    f"{save_dtype}; set the config's save_dtype to None or 'bfloat16'"
                )
            tensor = stored
        result[key] = tensor
    return result
