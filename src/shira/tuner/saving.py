# SPDX-License-Identifier: Apache-2.0
"""What ``save_pretrained`` writes of a model of which each process holds a part: `whole_values`."""

from __future__ import annotations

from torch import Tensor, nn

from shira.store.sharded import gathered, is_partitioned, whole
from shira.tuner.layer import ShiraLayer


def whole_values(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict with the values of an adapter whole, for PEFT to write.

    A collective call where the state dict is that of a sharded model (FSDP2, ZeRO-3); none where
    the caller has gathered it already, as Accelerate and Trainer do.

    Args:
        model: With the adapter's layers.
        adapter_name: Of the adapter.
        state_dict: By the names of the model's own state dict.
    """
    parameters = {
        f"{name}.shira_weight.{adapter_name}": layer.shira_weight[adapter_name]
        for name, layer in model.named_modules()
        if isinstance(layer, ShiraLayer) and adapter_name in layer.shira_weight
    }
    result = dict(state_dict)
    missing = {
        key: parameter
        for key, parameter in parameters.items()
        if key in state_dict and is_partitioned(parameter) and not state_dict[key].numel()
    }
    with gathered(missing.values()):
        result.update({key: parameter.detach().clone() for key, parameter in missing.items()})
    for key in parameters:
        if key in result:
            result[key] = whole(result[key])
    return result
