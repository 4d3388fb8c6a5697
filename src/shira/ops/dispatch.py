# SPDX-License-Identifier: Apache-2.0
"""Which way the weight gradient takes, and why: `choose`, and the ways to say otherwise.

===========  ========  =============================================================================
backend      runs on   what it is
===========  ========  =============================================================================
``tiles``    any       small products over the tiles of a block mask alone (``tiles.py``)
``native``   CPU       a dot product for each entry, compiled (``native/entries.c``)
``sampled``  CPU       the same through torch's ``sparse.sampled_addmm``
``chunked``  any       the dense product, some rows at a time in bounded scratch (``chunked.py``)
``triton``   CUDA      tiles of the product, of which only the entries are written
                       (``triton_gradient.py``); not yet measured, so taken only when asked for
===========  ========  =============================================================================

The first that can is taken. ``SHIRA_BACKEND=name`` in the environment or `use_backend` takes
another one; one that cannot compute the case at hand is then an error, never silently another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

from shira.errors import ConfigError, did_you_mean
from shira.ops import native, triton_gradient
from shira.ops.util import quiet_about_csr

DENSE_FROM = {"native": 0.2, "sampled": 0.1}
"""Density above which a dense product is faster than single dot products.

``sampled`` was measured on two cores; ``native`` is extrapolated from its times at 2 %
(``benchmarks/results/kernel.json``).
"""


class Case(NamedTuple):
    """What the choice depends on."""

    device: str
    """``"cpu"``, ``"cuda"``, ..."""
    dtype: torch.dtype
    density: float
    tiled: bool = False
    """Whether the support fills square tiles, as those of block masks do."""


class Choice(NamedTuple):
    """Which way was chosen, and why."""

    name: str
    why: str


def _tiles(case: Case) -> str | None:
    return None if case.tiled else "the support does not fill square tiles"


def _native(case: Case) -> str | None:
    if case.device != "cpu":
        return f"it runs on the CPU, not on {case.device}"
    if case.dtype not in native.KINDS:
        return f"it takes float32, bfloat16 and float16, not {case.dtype}"
    loaded = native.load()
    return None if loaded.library else loaded.why


def _sampled(case: Case) -> str | None:
    if case.device != "cpu":
        return f"it runs on the CPU, not on {case.device}"
    return None if has_sampled_product() else "this build of torch has no sparse.sampled_addmm"


def _chunked(case: Case) -> str | None:
    return None


def _triton(case: Case) -> str | None:
    able, why = triton_gradient.available(case.device, case.dtype)
    return None if able else why


# In order of preference: name -> why it cannot compute the case, or None if it can.
BACKENDS: dict[str, Callable[[Case], str | None]] = {
    "tiles": _tiles,
    "native": _native,
    "sampled": _sampled,
    "chunked": _chunked,
    "triton": _triton,
}

_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


def choose(
    device: torch.device | str, dtype: torch.dtype, density: float, *, tiled: bool = False
) -> Choice:
    """Which backend the weight gradient takes for such operands.

    Args:
        device: Where the operands are.
        dtype: Their dtype.
        density: Of the support, between 0 and 1.
        tiled: Whether the support fills square tiles.

    Raises:
        ConfigError: If ``SHIRA_BACKEND`` or `use_backend` names a backend that is unknown or cannot
            compute this.
    """
    case = Case(torch.device(device).type, dtype, density, tiled)
    told = backend_told()
    if told:
        return _as_told(_known(told), case)
    passed_over = []
    for name, cannot in BACKENDS.items():
        reason = cannot(case) or _slower(name, case)
        if reason is None:
            break
        passed_over.append(f"not {name}: {reason}")
    return Choice(name, "; ".join(passed_over) or "the support fills square tiles")


def backend_told() -> str | None:
    """The backend that `use_backend` or ``SHIRA_BACKEND`` names, if one does."""
    return _forced.get() or os.environ.get("SHIRA_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, and in this thread or task, the weight gradient takes this backend.

    A backward pass runs in threads of its own on accelerators, which see ``SHIRA_BACKEND`` alone.

    Raises:
        ConfigError: If there is no backend of this name.
    """
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def has_sampled_product() -> bool:
    """Whether this build of torch has ``sparse.sampled_addmm`` on the CPU (it needs MKL)."""
    quiet_about_csr()
    pattern = torch.eye(1).to_sparse_csr()
    try:
        torch.sparse.sampled_addmm(pattern, torch.ones(1, 1), torch.ones(1, 1))
    except RuntimeError:
        return False
    return True


def _slower(name: str, case: Case) -> str | None:
    limit = DENSE_FROM.get(name, 1.0)
    if case.density > limit:
        return f"density {case.density:.3g} is over {limit}, where a dense product is faster"
    return None


def _as_told(name: str, case: Case) -> Choice:
    reason = BACKENDS[name](case)
    if reason is not None:
        raise ConfigError(
            f"the backend {name!r}, asked for by SHIRA_BACKEND or use_backend, cannot compute the "
            f"weight gradient at density {case.density:.3g} in {case.dtype} on {case.device}: "
            f"{reason}"
        )
    return Choice(name, "asked for by SHIRA_BACKEND or use_backend")


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no backend {name!r}; known are {', '.join(BACKENDS)}."
            f"{did_you_mean(name, BACKENDS)}"
        )
    return name
