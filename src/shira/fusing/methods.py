# SPDX-License-Identifier: Apache-2.0
"""The ways to fuse: pure functions, and `METHODS`, the table of which method takes which.

Some functions make one delta sparser before it is combined: TIES' trim, DARE's drop, DELLA's
MagPrune. Their ``density`` is the share of the delta's own entries that stay (PEFT's and mergekit's
word). Others make one delta of several: the weighted sum and mean, and TIES' elected mean. These
work on the union of the supports, where a position that a delta lacks is a zero of it; sums are
made in float32 (float64 if a delta is) in the order given, each product rounded before it is added.

Sources are in the docstrings. A further method is a function in a file of its own and a row in the
table.
"""

from __future__ import annotations

import hashlib
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.delta import SparseDelta
from shira.errors import ConfigError, did_you_mean
from shira.masks.topk import top_k_of_all
from shira.support import Support, align, matrix_shape

EPSILON = 0.1
"""Default width of DELLA's range of probabilities."""


def trim(delta: SparseDelta, density: float) -> SparseDelta:
    """Keep the ``int(density * k)`` entries of largest magnitude; of equal ones the first.

    TIES-Merging, arXiv 2306.01708, section 3, step 1; PEFT's ``magnitude_based_pruning``.
    """
    return keep_largest({"": delta}, int(density * delta.nnz))[""]


def drop(delta: SparseDelta, density: float, draw: Tensor) -> SparseDelta:
    """Keep each entry with probability ``density`` and divide it by that: the mean stays.

    DARE, arXiv 2311.03099, section 3: drop and rescale. ``draw`` is float64 ``(k,)``, uniform in
    [0, 1), on the CPU.
    """
    return _sample(delta, torch.full_like(draw, density), draw)


def mag_prune(delta: SparseDelta, density: float, epsilon: float, draw: Tensor) -> SparseDelta:
    """Do as `drop`, but keep large entries more often than small ones.

    DELLA, arXiv 2406.11617, section 3.1 (MagPrune): within a row, the probability to stay goes
    from ``density - epsilon / 2`` for the smallest to ``density + epsilon / 2`` for the largest;
    what stays is divided by its own probability.
    """
    rank = row_rank(delta).cpu()  # (k,) from 0 to 1
    return _sample(delta, (density - epsilon / 2) + epsilon * rank, draw)


def weighted_sum(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """Return ``sum_i weights[i] * deltas[i]`` on the union (task arithmetic, arXiv 2212.04089)."""
    union, places = align([delta.support for delta in deltas])
    wide = accumulation_dtype(*(delta.values.dtype for delta in deltas))
    total = torch.zeros(union.nnz, dtype=wide, device=union.indices.device)
    for delta, weight, place in zip(deltas, weights, places, strict=True):
        _add(total, place, delta.values.detach().to(wide) * weight)
    return SparseDelta(union, total)


def weighted_mean(
    deltas: Sequence[SparseDelta], weights: Sequence[float], total_weight: float
) -> SparseDelta:
    """Return `weighted_sum` over the weights of all adapters, those without the parameter too."""
    total = weighted_sum(deltas, weights)
    return SparseDelta(total.support, total.values / total_weight)


def elected_mean(
    deltas: Sequence[SparseDelta], weights: Sequence[float], majority_sign_method: str = "total"
) -> SparseDelta:
    """Elect a sign at each position, and average the weighted values that have it.

    TIES-Merging, arXiv 2306.01708, section 3, steps 2 and 3, in PEFT's form: the vote is among the
    values before they are weighted, a tie elects plus, and the sum of those that agree is divided
    by their number. ``"total"`` elects the sign of the sum, ``"frequency"`` that of most values.
    """
    union, places = align([delta.support for delta in deltas])
    wide = accumulation_dtype(*(delta.values.dtype for delta in deltas))
    total = torch.zeros(union.nnz, dtype=wide, device=union.indices.device)
    values = [delta.values.detach().to(wide) for delta in deltas]
    for value, place in zip(values, places, strict=True):
        _add(total, place, value.sign() if majority_sign_method == "frequency" else value)
    elected = torch.where(total >= 0, 1.0, -1.0).to(wide)  # (union.nnz,)
    total.zero_()
    agreeing = torch.zeros_like(total)
    for value, weight, place in zip(values, weights, places, strict=True):
        agrees = value.sign() == (elected if place is None else elected[place])
        _add(total, place, torch.where(agrees, value * weight, 0.0))
        _add(agreeing, place, agrees.to(wide))
    return SparseDelta(union, total / agreeing.clamp(min=1))


def keep_largest(deltas: Mapping[str, SparseDelta], k: int) -> dict[str, SparseDelta]:
    """Keep the k entries of largest magnitude over all parameters together.

    Values keep their bits, parameters their place. Of equal magnitudes the first are kept,
    parameters counted in the order of their names, so that the order in which they come does not
    matter. A parameter may end with no entry.

    Args:
        deltas: By parameter name, on one device.
        k: How many entries to keep in all.

    Example:
        >>> delta = SparseDelta(Support((2, 3), torch.tensor([0, 4])), torch.tensor([1.0, -2.0]))
        >>> keep_largest({"w": delta}, 1)["w"].support.indices
        tensor([4], dtype=torch.int32)
    """
    if k >= sum(delta.nnz for delta in deltas.values()):
        return dict(deltas)
    ordered = sorted(deltas)
    kept = top_k_of_all(
        {name: [magnitude(deltas[name])] for name in ordered},
        {name: deltas[name].nnz for name in ordered},
        k,
    )
    return {
        name: select(delta, kept[name].to(delta.values.device)) for name, delta in deltas.items()
    }


def select(delta: SparseDelta, entries: Tensor) -> SparseDelta:
    """Return the delta on some of its entries: int64 in increasing order, or a boolean mask."""
    support = Support._trusted(delta.support.shape, delta.support.indices[entries])
    return SparseDelta(support, delta.values[entries])


def magnitude(delta: SparseDelta) -> Tensor:
    """Return the values' magnitudes ``(k,)`` in float32, or float64 if the values are."""
    return delta.values.detach().to(accumulation_dtype(delta.values.dtype)).abs()


def row_rank(delta: SparseDelta) -> Tensor:
    """Rank each entry by magnitude in its row: float64 from 0 to 1, 0.5 if it is the only one."""
    rows, cols = matrix_shape(delta.support.shape)
    row = delta.support.indices.long() // max(cols, 1)  # (k,) sorted
    order = torch.argsort(magnitude(delta), stable=True)
    order = order[torch.argsort(row[order], stable=True)]  # by row, in it by magnitude
    count = torch.bincount(row, minlength=rows)
    start = count.cumsum(0) - count
    rank = torch.empty(delta.nnz, dtype=torch.float64, device=row.device)
    rank[order] = (torch.arange(delta.nnz, device=row.device) - start[row]).double()
    last = (count[row] - 1).double()
    return torch.where(last > 0, rank / last.clamp(min=1), 0.5)


def digest(delta: SparseDelta) -> bytes:
    """Hash a delta's shape, positions, dtype and values; the same on every device.

    Random draws are keyed by it, and it gives deltas an order of their own in which sums are made,
    so that ``fuse([a, b])`` and ``fuse([b, a])`` are the same, bit for bit.
    """
    made = hashlib.blake2b(f"{delta.support.shape} {delta.values.dtype}".encode(), digest_size=16)
    for tensor in (delta.support.indices, delta.values):
        made.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return made.digest()


def uniform(count: int, seed: int, name: str, delta: bytes, occurrence: int = 0) -> Tensor:
    """Draw float64 numbers ``(count,)`` in [0, 1) for a delta's entries, on the CPU.

    They are the same on every platform and with every version of numpy; no global generator is
    used. ``occurrence`` tells deltas apart that are equal in every bit.
    """
    text = f"{int(seed)}\0{occurrence}\0{name}\0".encode("utf-8", "surrogatepass") + delta
    key = hashlib.blake2b(text, digest_size=16, person=b"shira.fuse").digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _sample(delta: SparseDelta, chance: Tensor, draw: Tensor) -> SparseDelta:
    kept = (draw < chance).nonzero().squeeze(1)
    stays = select(delta, kept.to(delta.values.device))
    wide = stays.values.to(accumulation_dtype(delta.values.dtype))
    return SparseDelta(stays.support, wide / chance[kept].to(wide))


def _add(total: Tensor, place: Tensor | None, values: Tensor) -> None:
    """Add ``(k,)`` values at places that occur once each; None is everywhere."""
    if place is None:
        total += values
    else:
        total.index_add_(0, place, values)


@dataclass(frozen=True)
class Method:
    """One way to fuse.

    The functions name the options of `shira.fuse` that they take as parameters, behind the delta or
    the deltas and weights; ``draw`` (uniform numbers for the delta's entries) and ``total_weight``
    (of all adapters) are given to them too.

    Attributes:
        combine: Makes one delta of all of a weight.
        sparsify: Thins out each delta first.
        density: Default of that option.
        budget: Whether the result is pruned to ``k`` entries.
        associative: Whether ``fuse([fuse([a, b]), c])`` is ``fuse([a, b, c])``: the positions
            exactly, the values to rounding. All methods are commutative, bit for bit.
    """

    combine: Callable[..., SparseDelta]
    sparsify: Callable[..., SparseDelta] | None = None
    density: float | None = None
    budget: bool = False
    associative: bool = False

    @cached_property
    def random(self) -> bool:
        """True if it draws; it then takes a seed."""
        return self.sparsify is not None and "draw" in parameters_of(self.sparsify)

    @cached_property
    def options(self) -> tuple[str, ...]:
        """Options of `shira.fuse` that it takes."""
        named = [name for f in (self.sparsify, self.combine) if f for name in parameters_of(f)]
        own = ["seed" if name == "draw" else name for name in named if name != "total_weight"]
        return ("density", "k", *own) if self.budget else tuple(own)


@cache
def parameters_of(function: Callable[..., SparseDelta]) -> tuple[str, ...]:
    """Return the names of a function's parameters but for the delta, or deltas and weights."""
    known = ("delta", "deltas", "weights")
    return tuple(name for name in inspect.signature(function).parameters if name not in known)


METHODS: Mapping[str, Method] = {
    "sum": Method(weighted_sum, associative=True),
    "mean": Method(weighted_mean),
    "ties": Method(elected_mean, trim, density=1.0),
    "dare": Method(weighted_sum, drop, density=0.5),
    "dare_ties": Method(elected_mean, drop, density=0.5),
    "della": Method(elected_mean, mag_prune, density=0.5),
    "magnitude": Method(weighted_sum, budget=True),
    "magnitude_prune": Method(weighted_sum, trim, density=0.5),
}


def method_of(name: str, given: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Return the row of `METHODS`, and its options, checked, with defaults filled in."""
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}; there are {', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    method = METHODS[name]
    for option in given:
        if option not in method.options:
            raise ConfigError(
                f"method {name!r} has no option {option!r}; it has "
                f"{', '.join(method.options) or 'none'}"
            )
    density = given.get("density", method.density)
    if density is not None:
        if not (isinstance(density, numbers.Real) and 0 < density <= 1):  # type: ignore[operator]
            raise ConfigError(f"density is a share in (0, 1], not {density!r}")
        density = float(density)
    count = given.get("k")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ConfigError(f"k is a number of entries, not {count!r}")
    if count is not None and "density" in given:
        raise ConfigError("k and density are two ways to give one budget; give one of them")
    vote = given.get("majority_sign_method", "total")
    if vote not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method is 'total' or 'frequency', not {vote!r}")
    seed = given.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed is an integer, not {seed!r}")
    settings = {"density": density, "majority_sign_method": vote, "seed": seed}
    if "epsilon" in method.options:
        assert density is not None  # such methods have a default
        room = 2 * min(density, 1 - density)
        width = given.get("epsilon", min(EPSILON, room))
        wide = room * (1 + 1e-9)
        if not (isinstance(width, numbers.Real) and 0 <= width <= wide):  # type: ignore[operator]
            raise ConfigError(
                f"epsilon={width!r} does not fit density={density}: density - epsilon / 2 and "
                f"density + epsilon / 2 are probabilities, so it is from 0 to {room:g}"
            )
        settings["epsilon"] = float(width)
    return method, settings
