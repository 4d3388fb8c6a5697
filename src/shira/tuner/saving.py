# SPDX-License-Identifier: Apache-2.0
"""What ``save_pretrained`` writes: whole values (`whole_values`), in few bytes (`in_few_bytes`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shira.errors import AdapterError
from shira.ops.packed import unpack
from shira.store.sharded import gathered, is_partitioned, whole
from shira.tuner.layer import ShiraLayer

_STORED = ("shira_weight", "shira_indices")


def whole_values(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict with the values of an adapter whole and its positions as PEFT has them.

    A collective call where the state dict is that of a sharded model (FSDP2, ZeRO-3); none where
    the caller has gathered it already, as Accelerate and Trainer do.

    Args:
        model: With the adapter's layers.
        adapter_name: Of the adapter.
        state_dict: By the names of the model's own state dict.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, ShiraLayer) and adapter_name in layer.shira_weight
    }
    parameters = {
        f"{name}.shira_weight.{adapter_name}": layer.shira_weight[adapter_name]
        for name, layer in layers.items()
    }
    result = dict(state_dict)
    missing = {
        key: parameter
        for key, parameter in parameters.items()
        if key in state_dict and is_partitioned(parameter) and not state_dict[key].numel()
    }
    with gathered(missing.values()):
        result.update({key: parameter.detach().clone() for key, parameter in missing.items()})
    for name, layer in layers.items():
        value_key, index_key = (f"{name}.{kind}.{adapter_name}" for kind in _STORED)
        if value_key in result:
            result[value_key] = whole(result[value_key])
        if index_key in result:  # as they are kept, if this is no state dict but a list of buffers
            result[index_key] = unpack(result[index_key], layer.weight_shape)
    return result


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
