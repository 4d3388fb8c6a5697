# SPDX-License-Identifier: Apache-2.0
"""``(left^T right)[S]``: the gradient of a weight at a support, without the dense gradient.

===========  ========  =============================================================================
backend      runs on   what it is
===========  ========  =============================================================================
``tiles``    any       small products over the tiles of a block mask alone (``native/tiles.c``)
``native``   CPU       a dot product for each entry, compiled (``native/entries.c``)
``sampled``  CPU       the same through torch's ``sparse.sampled_addmm``
``chunked``  any       the dense product, some rows at a time in bounded scratch
``triton``   CUDA      tiles of the product, of which only the entries are written (``triton.py``);
                       not measured on a GPU, so taken only when asked for
===========  ========  =============================================================================

The first that can is taken. ``SHIRA_BACKEND=name`` in the environment or `use_backend` takes
another one; one that cannot compute the case at hand is then an error, never silently another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.errors import ConfigError, did_you_mean
from shira.ops import native
from shira.ops.gradient import triton
from shira.ops.gradient.through_torch import batched, chunked, has_sampled_product, sampled
from shira.ops.plan import Plan


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    """``"cpu"``, ``"cuda"``, ..."""
    dtype: torch.dtype
    density: float
    tiled: bool = False
    """Whether the support fills square tiles, as those of block masks do."""


class Choice(NamedTuple):
    """The backend that was chosen, and why."""

    name: str
    why: str


class Backend(NamedTuple):
    """One way to compute the weight gradient.

    Attributes:
        compute: From the operands, the plan and the result's dtype to the gradient ``(k,)``.
        refusal: Says why it cannot compute a case; None if it can.
        dense_from: Density above which a dense product is faster. That of ``sampled`` was measured
            on two cores, that of ``native`` is extrapolated from its times at 2 %
            (``benchmarks/results/kernel.json``).
    """

    compute: Callable[[Tensor, Tensor, Plan, torch.dtype], Tensor]
    refusal: Callable[[Case], str | None]
    dense_from: float = 1.0


def weight_gradient(left: Tensor, right: Tensor, plan: Plan) -> Tensor:
    """Compute ``(left^T right)`` at the plan's support.

    Args:
        left: ``(tokens, rows)``.
        right: ``(tokens, cols)``, same dtype.
        plan: Of a support on a weight that is a ``(rows, cols)`` matrix.

    Returns:
        ``(k,)``, accumulated and returned in float32 (float64 for float64 operands).

    Example:
        >>> plan = shira.ops.make_plan([torch.tensor([[0, 1], [2, 0]])], (2, 3), (3, 1))
        >>> shira.ops.weight_gradient(torch.ones(4, 2), 2 * torch.ones(4, 3), plan)
        tensor([8., 8.])
    """
    wide = accumulation_dtype(left.dtype, right.dtype)
    if not plan.nnz or not left.shape[0]:
        return torch.zeros(plan.nnz, dtype=wide, device=left.device)
    backend = plan.memo((_told(), left.dtype), _backend_for, left, plan)
    return backend.compute(left, right, plan, wide)


def choose(
    device: torch.device | str, dtype: torch.dtype, density: float, *, tiled: bool = False
) -> Choice:
    """Choose the backend of the weight gradient for such operands.

    Args:
        device: Where the operands are.
        dtype: Their dtype.
        density: Of the support, between 0 and 1.
        tiled: Whether the support fills square tiles.

    Raises:
        ConfigError: If ``SHIRA_BACKEND`` or `use_backend` names a backend that is unknown or cannot
            compute this.

    Example:
        >>> shira.ops.choose("cpu", torch.float32, 0.02, tiled=True)
        Choice(name='tiles', why='the support fills square tiles')
    """
    case = Case(torch.device(device).type, dtype, density, tiled)
    told = _told()
    if told:
        reason = BACKENDS[_known(told)].refusal(case)
        if reason is not None:
            raise ConfigError(
                f"the backend {told!r}, asked for by SHIRA_BACKEND or use_backend, cannot compute "
                f"the weight gradient at density {density:.3g} in {dtype} on {case.device}: "
                f"{reason}"
            )
        return Choice(told, "asked for by SHIRA_BACKEND or use_backend")
    passed_over = []
    for name, backend in BACKENDS.items():
        reason = backend.refusal(case)
        if reason is None and density > backend.dense_from:
            reason = (
                f"density {density:.3g} is over {backend.dense_from}, where a dense product is "
                "faster"
            )
        if reason is None:
            break
        passed_over.append(f"not {name}: {reason}")
    return Choice(name, "; ".join(passed_over) or "the support fills square tiles")


_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take this backend of the weight gradient within the context, in this thread or task.

    A backward pass runs in threads of its own on accelerators, which see ``SHIRA_BACKEND`` alone.

    Raises:
        ConfigError: If there is no backend of this name.

    Example:
        >>> with shira.ops.use_backend("chunked"):
        ...     shira.ops.choose("cpu", torch.float32, 0.02).name
        'chunked'
    """
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def _told() -> str | None:
    return _forced.get() or os.environ.get("SHIRA_BACKEND")


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no backend {name!r}; known are {', '.join(BACKENDS)}."
            f"{did_you_mean(name, BACKENDS)}"
        )
    return name


def _backend_for(left: Tensor, plan: Plan) -> Backend:
    tiled = plan.tiles is not None
    return BACKENDS[choose(left.device, left.dtype, plan.density, tiled=tiled).name]


def _tiles(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    assert plan.tiles is not None
    kernels = native.load().library
    if kernels is not None and left.device.type == "cpu" and left.dtype in native.KINDS:
        at = plan.tiles
        return kernels.tiles(left, right, *plan.compressed(), at.size, at.row, at.col)
    return batched(left, right, plan, plan.tiles, wide)


def _native(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    kernels = native.load().library
    assert kernels is not None
    return kernels.entries(left, right, *plan.compressed())


def _no_tiles(case: Case) -> str | None:
    return None if case.tiled else "the support does not fill square tiles"


def _not_native(case: Case) -> str | None:
    if case.device != "cpu":
        return f"it runs on the CPU, not on {case.device}"
    if case.dtype not in native.KINDS:
        return f"it takes float32, bfloat16 and float16, not {case.dtype}"
    loaded = native.load()
    return None if loaded.library else loaded.why


def _not_sampled(case: Case) -> str | None:
    if case.device != "cpu":
        return f"it runs on the CPU, not on {case.device}"
    return None if has_sampled_product() else "this build of torch has no sparse.sampled_addmm"


def _not_triton(case: Case) -> str | None:
    able, why = triton.available(case.device, case.dtype)
    return None if able else why


# In order of preference.
BACKENDS = {
    "tiles": Backend(_tiles, _no_tiles),
    "native": Backend(_native, _not_native, 0.2),
    "sampled": Backend(sampled, _not_sampled, 0.1),
    "chunked": Backend(chunked, lambda case: None),
    "triton": Backend(triton.triton_weight_gradient, _not_triton),
}
