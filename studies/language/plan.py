# SPDX-License-Identifier: Apache-2.0
"""Which runs are missing, in which order, given those that were made. A pure function of them.

Every tuning run comes before every final one, and the final ones go seed by seed; what the
comparison at equal gain still needs comes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from studies.language.cells import final_runs, tuning_runs
from studies.language.frontier import frontier_runs
from studies.language.protocol import FINAL_SEEDS, METHODS, TARGETS, Run
from studies.language.store import Done


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    `tuning`, `final` and `frontier` are runs that could be made now; `unknown_finals` counts those
    whose rate is not known yet. Tuning runs beyond the grid, and runs of the frontier, are counted
    as soon as they are called for.
    """

    tuning: list[Run]
    final: list[Run]
    frontier: list[Run]
    unknown_finals: int

    @property
    def runs(self) -> list[Run]:
        """The runs that could be made now, in order."""
        return self.tuning + self.final + self.frontier

    @property
    def missing(self) -> int:
        """How many runs are missing in all, at least."""
        return len(self.runs) + self.unknown_finals


def plan(done: Mapping[str, Done], targets: Iterable[str] = TARGETS) -> Plan:
    """The missing runs of `targets`."""
    tuning: list[Run] = []
    final: list[Run] = []
    frontier: list[Run] = []
    unknown = 0
    for target in targets:
        for method in METHODS:
            tuning += [run for run in tuning_runs(done, target, method) if run.key not in done]
            runs = final_runs(done, target, method)
            final += [run for run in runs or () if run.key not in done]
            unknown += len(FINAL_SEEDS) if runs is None else 0
        frontier += [run for run in frontier_runs(done, target) if run.key not in done]
    return Plan(tuning, sorted(final, key=lambda run: run.seed), frontier, unknown)
