# SPDX-License-Identifier: Apache-2.0
"""What `shira overlap` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from shira.cli._fuse.pairs import FIGURES, Either
from shira.cli.output import table
from shira.measure import Estimate, Overlap, Rank

_FEW = 24  # weights that are listed without --all
FIGURE_NAMES = ("k a", "k b", "shared", "jaccard", "conflicts", "cosine", "AWOM", "AWOR")


def pairs(found: Sequence[Overlap]) -> Table:
    """A row for each pair."""
    result = table("Pairs", "a", "b", *FIGURE_NAMES, right=FIGURE_NAMES)
    for pair in found:
        result.add_row(pair.a, pair.b, *figures(pair))
    return result


def parameters(pair: Overlap, *, each: bool) -> Table:
    """A row for each weight of a pair; some of them unless `each`."""
    shown = pair.parameters if each else pair.parameters[:_FEW]
    more = len(pair.parameters) - len(shown)
    result = table(
        f"{pair.a} and {pair.b}, weight by weight" + (f" ({more} more with --all)" if more else ""),
        "weight",
        *FIGURE_NAMES,
        "AWOR if random",
        right=(*FIGURE_NAMES, "AWOR if random"),
    )
    for parameter in shown:
        result.add_row(parameter.name, *figures(parameter), f"{parameter.awor_of_random:.4g}")
    return result


def whole_tensors(found: Sequence[Overlap]) -> Table:
    """Return a row for each whole tensor of each pair."""
    result = table("Whole tensors", "a", "b", "tensor", "")
    for pair in found:
        for name, state in pair.whole.items():
            result.add_row(pair.a, pair.b, name, state)
    return result


def matrix(names: Sequence[str], found: Sequence[Overlap], figure: str) -> Table:
    """One figure of all pairs, above and below the diagonal alike."""
    result = table(f"{figure} of all pairs", "", *names, right=tuple(names))
    values = {frozenset((pair.a, pair.b)): FIGURES[figure](pair) for pair in found}
    for name in names:
        cells = ("-" if other == name else _number(values, name, other) for other in names)
        result.add_row(name, *cells)
    return result


def ranks(found: Sequence[tuple[str, str, Rank]]) -> Table:
    """A row for each delta."""
    numbers = ("rank", "at most", "stable rank", "spectral norm")
    result = table("Numerical ranks", "adapter", "weight", *numbers, right=numbers)
    for adapter, parameter, rank in found:
        sign = ">= " if rank.at_least else "" if rank.exact else "~ "
        result.add_row(
            adapter,
            parameter,
            f"{sign}{rank.rank}",
            str(rank.bound),
            f"{rank.stable_rank:.1f}",
            str(rank.spectral_norm),
        )
    return result


def _number(values: dict[frozenset[str], float], name: str, other: str) -> str:
    return f"{values[frozenset((name, other))]:.4g}"


def figures(of: Either) -> tuple[str, ...]:
    """`FIGURE_NAMES` of a pair, or of one weight of it."""
    return (
        f"{of.nnz_a:,}",
        f"{of.nnz_b:,}",
        f"{of.shared:,}",
        f"{of.jaccard:.4f}",
        f"{of.sign_conflicts:,}",
        f"{of.cosine:+.4f}",
        _estimate(of.awom),
        _estimate(of.awor),
    )


def _estimate(value: Estimate | None) -> str:
    return "-" if value is None else str(value)
