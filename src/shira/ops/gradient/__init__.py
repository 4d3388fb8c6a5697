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

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.errors import ConfigError, did_you_mean
from shira.ops import native
from shira.ops.gradient import triton
from shira.ops.plan import Plan

_TOKENS_AT_A_TIME = 256  # 1 MiB of a 1024-column operand in float32
_scratch_bytes = 64 * 2**20


class Choice(NamedTuple):
    """The backend that was chosen, and why."""

    name: str
    why: str


class Backend(NamedTuple):
    """One way to compute the weight gradient."""

    compute: Callable[[Tensor, Tensor, Plan, torch.dtype], Tensor]
    """From the operands, the plan and the result's dtype to the gradient ``(k,)``."""
    refusal: Callable[[str, torch.dtype, bool], str | None]
    """From device type, dtype and whether the support fills square tiles to the reason why it
    cannot compute such a case; None if it can."""
    dense_from: float = 1.0
    """Density above which a dense product is faster."""


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
    backend = plan.memo((asked_for(), left.dtype), _backend_for, left, plan)
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
    case = torch.device(device).type, dtype, tiled
    told = asked_for()
    if told:
        reason = BACKENDS[_known(told)].refusal(*case)
        if reason is not None:
            raise ConfigError(
                f"the backend {told!r}, asked for by SHIRA_BACKEND or use_backend, cannot compute "
                f"the weight gradient at density {density:.3g} in {dtype} on {case[0]}: "
                f"{reason}"
            )
        return Choice(told, "asked for by SHIRA_BACKEND or use_backend")
    passed_over = []
    for name, backend in BACKENDS.items():
        reason = backend.refusal(*case)
        if reason is None and density > backend.dense_from:
            reason = (
                f"density {density:.3g} is over {backend.dense_from}, where a dense product is "
                "faster"
            )
        if reason is None:
            break
        passed_over.append(f"not {name}: {reason}")
    if case[0] != "cpu" and not tiled:
        passed_over.append(_ADVICE)
    return Choice(name, "; ".join(passed_over) or "the support fills square tiles")


_ADVICE = (
    "entries scattered over a weight need the whole product on an accelerator, and those of "
    'blocks need theirs alone: take mask_type="block" there'
)
_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take this backend of the weight gradient within the context, in this thread or task.

    With ``triton``, `add_products` too takes its Triton kernel where that can. A backward pass
    runs in threads of its own on accelerators, which see ``SHIRA_BACKEND`` alone.

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


def asked_for() -> str | None:
    """Return the backend that ``SHIRA_BACKEND`` or `use_backend` names."""
    return _forced.get() or os.environ.get("SHIRA_BACKEND")


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no backend {name!r}; known are {', '.join(BACKENDS)}."
            f"{did_you_mean(name, BACKENDS)}"
        )
    return name


def _backend_for(left: Tensor, plan: Plan) -> Backend:
    density, tiled = plan.nnz / math.prod(plan.shape), plan.tiles is not None
    return BACKENDS[choose(left.device, left.dtype, density, tiled=tiled).name]


def scratch_bytes() -> int:
    """Return the most memory of a piece of the dense gradient: ``SHIRA_SCRATCH_BYTES``, or 64 MiB.

    Raises:
        ConfigError: If the environment variable is not a positive whole number.
    """
    told = os.environ.get("SHIRA_SCRATCH_BYTES")
    if told is None:
        return _scratch_bytes
    if not told.isdecimal() or not int(told):
        raise ConfigError(f"SHIRA_SCRATCH_BYTES is a positive number of bytes, not {told!r}")
    return int(told)


def set_scratch_bytes(size: int) -> None:
    """Bound the buffer of the ``chunked`` backend; at least one row is always made.

    Raises:
        ConfigError: If the size is not positive.
    """
    global _scratch_bytes
    if size < 1:
        raise ConfigError(f"scratch memory is a positive number of bytes, not {size}")
    _scratch_bytes = size


def sampled(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Compute a dot product for each entry, through ``torch.sparse.sampled_addmm``.

    What the CPU does where the compiled kernels are missing, and in float64. Some tokens at a time,
    so that the operands of a row stay in the cache: measured a third faster than all tokens at once
    (1024 x 2816 weight, 1024 tokens, 2 %).
    """
    silence_csr_warning()
    crow, col = plan.compressed()
    total = torch.zeros(plan.nnz, dtype=wide, device=left.device)
    for first in range(0, left.shape[0], _TOKENS_AT_A_TIME):
        tokens = slice(first, first + _TOKENS_AT_A_TIME)
        rows = left[tokens].t().to(wide, memory_format=torch.contiguous_format)  # (rows, tokens)
        pattern = torch.sparse_csr_tensor(crow, col, total, plan.shape, check_invariants=False)
        total = torch.sparse.sampled_addmm(pattern, rows, right[tokens].to(wide)).values()
    return total


@cache
def has_sampled_product() -> bool:
    """Return whether this build of torch has ``sparse.sampled_addmm`` on the CPU (it needs MKL)."""
    silence_csr_warning()
    pattern = torch.eye(1).to_sparse_csr()
    try:
        torch.sparse.sampled_addmm(pattern, torch.ones(1, 1), torch.ones(1, 1))
    except RuntimeError:
        return False
    return True


@cache
def silence_csr_warning() -> None:
    """Make torch's one warning that sparse CSR is beta here, where it tells the user nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.eye(1).to_sparse_csr()


def chunked(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Compute dense rows of the gradient in a bounded buffer, of which the entries are gathered.

    2 * tokens * rows * cols operations, which tensor cores and dense supports make the faster way.
    """
    rows, cols = plan.shape
    product_dtype = wide if left.device.type == "cpu" else left.dtype
    step = max(1, scratch_bytes() // max(1, cols * product_dtype.itemsize))
    starts = plan.memo("starts", lambda: plan.pattern().crow.tolist())
    out = torch.empty(plan.nnz, dtype=product_dtype, device=left.device)
    right, flat = right.to(product_dtype), plan.flat()
    for first in range(0, rows, step):
        last = min(rows, first + step)
        begin, end = starts[first], starts[last]
        if begin == end:
            continue
        piece = left[:, first:last].t().to(product_dtype) @ right  # (last - first, cols)
        place = flat[begin:end] - first * cols if first else flat[:end]
        torch.index_select(piece.view(-1), 0, place, out=out[begin:end])
    return out.to(wide)


def batched(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Compute the tiles in which all entries lie, through ``torch.bmm``.

    Some tiles at a time, so that the copies of their operands stay bounded.
    """
    tiles, tokens = plan.tiles, left.shape[0]
    assert tiles is not None
    size = tiles.block_size
    product_dtype = wide if left.device.type == "cpu" else left.dtype
    down, across = _in_tiles(left, size), _in_tiles(right, size)  # (tokens, tiles, size)
    at_once = max(1, scratch_bytes() // (2 * tokens * size * left.itemsize + size * size * 4))
    products = torch.empty(len(tiles), size, size, dtype=product_dtype, device=left.device)
    for first in range(0, len(tiles), at_once):
        some = slice(first, first + at_once)
        a = down.index_select(1, tiles.row_block[some]).to(product_dtype)  # (tokens, tiles, size)
        b = across.index_select(1, tiles.col_block[some]).to(product_dtype)
        torch.bmm(a.permute(1, 2, 0), b.permute(1, 0, 2), out=products[some])
    return products.view(-1).index_select(0, plan.places()).to(wide)


def _in_tiles(operand: Tensor, size: int) -> Tensor:
    short = -operand.shape[1] % size
    if short:
        operand = torch.nn.functional.pad(operand, (0, short))
    return operand.reshape(operand.shape[0], -1, size)


def _tiles(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    kernels, tiles = native.load().library, plan.tiles
    if kernels is None or left.device.type != "cpu" or left.dtype not in native.KINDS:
        return batched(left, right, plan, wide)
    assert tiles is not None
    return kernels.tiles(left, right, *plan.compressed(), tiles)


def _native(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    kernels = native.load().library
    assert kernels is not None
    return kernels.entries(left, right, *plan.compressed())


def _not_native(device: str, dtype: torch.dtype, tiled: bool) -> str | None:
    if device == "cpu" and dtype not in native.KINDS:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    loaded = native.load()
    return _not_cpu(device) or (None if loaded.library else loaded.why)


def _not_sampled(device: str, dtype: torch.dtype, tiled: bool) -> str | None:
    missing = "this build of torch has no sparse.sampled_addmm"
    return _not_cpu(device) or (None if has_sampled_product() else missing)


def _not_cpu(device: str) -> str | None:
    return None if device == "cpu" else f"it runs on the CPU, not on {device}"


def _not_triton(device: str, dtype: torch.dtype, tiled: bool) -> str | None:
    able, why = triton.available(device, dtype)
    return None if able else why


# In order of preference. The density of ``sampled`` was measured on two cores; that of ``native``
# is extrapolated from its times at 2 % (``benchmarks/results/kernel.json``).
BACKENDS = {
    "tiles": Backend(
        _tiles, lambda *case: None if case[-1] else "the support does not fill square tiles"
    ),
    "native": Backend(_native, _not_native, 0.2),
    "sampled": Backend(sampled, _not_sampled, 0.1),
    "chunked": Backend(chunked, lambda *case: None),
    "triton": Backend(triton.triton_weight_gradient, _not_triton),
}
