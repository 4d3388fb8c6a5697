# SPDX-License-Identifier: Apache-2.0
"""An adapter in the form of vLLM's own sparse weight update.

vLLM can apply patches in checkpoint coordinates by itself (its ``sparse_nccl`` weight transfer,
or ``load_checkpoint_weight_patches`` in a worker). That costs a pass over each whole weight, keeps
nothing to undo it by, and drops no cache; it is a way in for those who use it already, not the way
to switch. Coordinates and values are those of `shira.convert.to_patches`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from shira.adapter import Adapter
from shira.convert import to_patches
from shira.errors import MissingDependencyError


def to_vllm_patches(
    adapter: Adapter,
    base: nn.Module | str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    scale: float = 1.0,
    check_base: bool = True,
) -> list[Any]:
    """Return an adapter as vLLM's ``SparseWeightPatch``es, as `shira.convert.to_patches` does.

    Returns:
        One ``vllm.distributed.weight_transfer.sparse_nccl_engine.SparseWeightPatch`` for each
        weight: ``name``, int32 ``indices``, ``values`` in the weight's dtype, ``full_shape``.

    Raises:
        MissingDependencyError: If vLLM is not installed.
        ShiraError: As `shira.convert.to_patches`.
    """
    try:
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch
    except ImportError as error:
        raise MissingDependencyError(
            "vLLM's patches need vLLM; shira.convert.to_patches gives the same without"
        ) from error
    return [
        SparseWeightPatch(*patch)
        for patch in to_patches(adapter, base, scale=scale, check_base=check_base)
    ]
