# SPDX-License-Identifier: Apache-2.0
"""All pairs of some adapters, and the figures that are shown of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from shira.adapter import Adapter
from shira.cli.progress import Steps
from shira.errors import ConfigError, did_you_mean
from shira.measure import Overlap, ParameterOverlap, Rank, numerical_rank, overlap

Either = Overlap | ParameterOverlap
FIGURES: Mapping[str, Callable[[Either], float]] = {
    "jaccard": lambda of: of.jaccard,
    "shared": lambda of: of.shared,
    "conflicts": lambda of: of.conflict_share,
    "cosine": lambda of: of.cosine,
    "awom": lambda of: 0.0 if of.awom is None else of.awom.value,
    "awor": lambda of: 0.0 if of.awor is None else of.awor.value,
}
"""What a matrix of pairs may show; ``conflicts`` as a share of the shared entries."""


def check_figure(name: str) -> None:
    """Refuse a name that is not in `FIGURES`.

    Raises:
        ConfigError: If it is not.
    """
    if name not in FIGURES:
        raise ConfigError(
            f"--figure {name}: there are {', '.join(FIGURES)}.{did_you_mean(name, FIGURES)}"
        )


def all_pairs(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    *,
    interference: bool,
    seed: int,
    check_base: bool,
) -> list[Overlap]:
    """The overlap of each two, in the order (0, 1), (0, 2), ..., (1, 2), ..."""
    chosen = list(itertools.combinations(range(len(adapters)), 2))
    sizes = [len(adapters[i].keys() | adapters[j].keys()) for i, j in chosen]
    found = []
    with Steps("comparing", sum(sizes)) as steps:
        for number, (i, j) in enumerate(chosen):
            before = sum(sizes[:number])
            found.append(
                overlap(
                    adapters[i],
                    adapters[j],
                    interference=interference,
                    seed=seed,
                    check_base=check_base,
                    names=(names[i], names[j]),
                    progress=lambda done, _, before=before: steps.update(before + done),  # type: ignore[misc]
                )
            )
    return found


def ranks(
    adapters: Sequence[Adapter], names: Sequence[str], *, seed: int
) -> list[tuple[str, str, Rank]]:
    """The rank of each delta: adapter, parameter, rank; tells how far it is."""
    found = []
    with Steps("ranks", sum(map(len, adapters))) as steps:
        for name, adapter in zip(names, adapters, strict=True):
            for parameter, delta in adapter.items():
                found.append((name, parameter, numerical_rank(delta, seed=seed)))
                steps.update(len(found))
    return found
