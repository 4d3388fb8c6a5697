# SPDX-License-Identifier: Apache-2.0
"""Several adapters: read, named shortly, and compared pair by pair."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shira.adapter import Adapter
from shira.checkpoints import open_checkpoint
from shira.cli.options import check_paths
from shira.cli.progress import Steps, track
from shira.measure import Overlap, Rank, numerical_rank, overlap

FIGURES: Mapping[str, Callable[[Overlap], float]] = {
    "jaccard": lambda pair: pair.jaccard,
    "shared": lambda pair: pair.shared,
    "conflicts": lambda pair: pair.conflict_share,
    "cosine": lambda pair: pair.cosine,
    "awom": lambda pair: 0.0 if pair.awom is None else pair.awom.value,
    "awor": lambda pair: 0.0 if pair.awor is None else pair.awor.value,
}
"""Figures of a pair that a matrix may show; ``conflicts`` as a share of the shared entries."""


def read_all(paths: Sequence[str], base: str | None) -> list[Adapter]:
    """Read adapters, with a base that tells the shapes for files that lack them."""
    check_paths(paths)
    checkpoint = None if base is None else open_checkpoint(base)
    return [Adapter.load(path, base=checkpoint) for path in track(paths, "reading")]


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Return the ends of paths that tell them apart; paths that are the same get a number."""
    real = [Path(path).resolve() for path in paths]
    lengths = dict.fromkeys(real, 1)

    def name(path: Path) -> str:
        return "/".join(path.parts[-lengths[path] :]) or str(path)

    while twice := {n for n, count in Counter(map(name, lengths)).items() if count > 1}:
        for path in [path for path in lengths if name(path) in twice]:
            lengths[path] += 1
    return [
        name(path) if real.count(path) == 1 else f"{name(path)} ({real[:at].count(path) + 1})"
        for at, path in enumerate(real)
    ]


def all_pairs(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    *,
    interference: bool,
    seed: int,
    check_base: bool,
) -> list[Overlap]:
    """Return the overlap of each two, in the order (0, 1), (0, 2), ..., (1, 2), ..."""
    pairs = list(itertools.combinations(zip(names, adapters, strict=True), 2))
    done = itertools.count(1)
    with Steps("comparing", sum(len(a.keys() | b.keys()) for (_, a), (_, b) in pairs)) as steps:
        return [
            overlap(
                a,
                b,
                interference=interference,
                seed=seed,
                check_base=check_base,
                names=(of_a, of_b),
                progress=lambda *_: steps.update(next(done)),
            )
            for (of_a, a), (of_b, b) in pairs
        ]


def matrix(names: Sequence[str], pairs: Sequence[Overlap], figure: str) -> list[list[float | None]]:
    """Return a figure of all pairs, above and below the diagonal alike; None on it."""
    values = {frozenset((pair.a, pair.b)): FIGURES[figure](pair) for pair in pairs}
    return [[values.get(frozenset((name, other))) for other in names] for name in names]


def ranks(
    adapters: Sequence[Adapter], names: Sequence[str], *, seed: int
) -> dict[str, dict[str, Rank]]:
    """Return the rank of each delta, by adapter and parameter."""
    deltas = [(n, *item) for n, a in zip(names, adapters, strict=True) for item in a.items()]
    found: dict[str, dict[str, Rank]] = {name: {} for name in names}
    for name, parameter, delta in track(deltas, "ranks"):
        found[name][parameter] = numerical_rank(delta, seed=seed)
    return found
