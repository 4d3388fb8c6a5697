# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed ZeRO-3 keeps parameters in parts and gathers those of a module when it is called.

The values of an adapter are in a dictionary, which is never called; `fetch` lets DeepSpeed know
that their layer uses them.
"""

from __future__ import annotations

from torch import Tensor, nn

from shira.store.sharded import is_partitioned, is_sharded


def fetch(layer: nn.Module, parameter: Tensor) -> None:
    """Gather a parameter for the call of a layer that is under way, and for all later ones.

    This is what DeepSpeed does itself where it sees a module use another's parameter.

    Args:
        layer: From whose forward this is called.
        parameter: What it uses; if it is here, or not DeepSpeed's, it is left alone.
    """
    if is_partitioned(parameter) and is_sharded(parameter):
        import deepspeed

        deepspeed.zero.register_external_parameter(layer, parameter)
        parameter.all_gather()  # type: ignore[attr-defined]
