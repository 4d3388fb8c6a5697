# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: contenders take turns, and ratios are formed within each round.

A machine that is shared, or that changes its clock, is slow for seconds at a time. Timing one
contender after the other turns that into a difference between them. Here every round runs each
contender once, starting with another one each time, and the ratio to the reference is taken
inside the round, where both saw the same machine. `flank` goes further, for differences of a few
percent: the reference runs before and after each contender, which is compared with their mean.

glibc gives the free end of its heap back to the system, and the next step's first writes fetch it
page by page. With several contenders in one process, how much depends on who ran before: one and
the same step was seen with no page fault and with 24,000 (80 ms of the system's time in 2.4 s),
while alone the floor had 14,000 and ours 12,000. `keep_freed_memory` takes that out of the
comparison.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Lap:
    """Seconds between two marks of one run: by the clock, and of all threads' processor time."""

    wall: float
    cpu: float

    def __add__(self, other: Lap) -> Lap:
        return Lap(self.wall + other.wall, self.cpu + other.cpu)


class Laps:
    """Collects the phases of one run: call ``mark(name)`` at the end of each."""

    def __init__(self) -> None:
        self.phases: dict[str, Lap] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def mark(self, name: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.phases[name] = Lap(wall - self._wall, cpu - self._cpu)
        self._wall, self._cpu = wall, cpu

    @property
    def total(self) -> Lap:
        return sum(self.phases.values(), Lap(0.0, 0.0))


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> str:
    """Tell glibc to keep what is freed, for good; ``kept``, or ``as the system does``."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_MAX, 0)):
        return "as the system does"
    return "kept"


def interleave(
    runs: Mapping[str, Callable[[], Laps]],
    repeats: int,
    *,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Laps]]:
    """Run every contender ``warmup + repeats`` times, round by round; keep the last ``repeats``."""
    names = list(runs)
    kept: dict[str, list[Laps]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        progress(f"round {turn + 1} of {repeats}" if turn >= 0 else "warming up")
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            laps = runs[name]()
            if turn >= 0:
                kept[name].append(laps)
    return kept


def flank(
    runs: Mapping[str, Callable[[], Laps]],
    reference: str,
    repeats: int,
    *,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, list[Laps]], dict[str, list[Lap]]]:
    """As `interleave`, with a run of the reference before and after each contender's.

    The reference takes its turn as a contender too: its own ratio says how well this works.

    Returns:
        The laps of each contender, and beside each the mean of the reference's two neighbours.
    """
    beside: dict[str, list[Lap]] = {name: [] for name in runs}
    before = runs[reference]().total

    def flanked(name: str) -> Callable[[], Laps]:
        def run() -> Laps:
            nonlocal before
            laps = runs[name]()
            after = runs[reference]().total
            both = before + after
            beside[name].append(Lap(both.wall / 2, both.cpu / 2))
            before = after
            return laps

        return run

    turns = {name: flanked(name) for name in runs}
    kept = interleave(turns, repeats, warmup=warmup, progress=progress)
    return kept, {name: laps[warmup:] for name, laps in beside.items()}


def summary(samples: list[float]) -> dict[str, float]:
    """Minimum, median and quartiles of some samples, in their own unit."""
    low, middle, high = quartiles(samples)
    return {"min": min(samples), "median": middle, "q1": low, "q3": high}


def ratios(samples: list[float], reference: list[float]) -> dict[str, float]:
    """How many times the reference: of the minima, and pair by pair the median.

    Beside the median the quartiles and, as ``low`` and ``high``, what it is known to
    (`median_interval`).
    """
    paired = [a / b for a, b in zip(samples, reference, strict=True)]
    q1, middle, q3 = quartiles(paired)
    low, high = median_interval(paired)
    of_min = min(samples) / min(reference)
    return {"of_min": of_min, "median": middle, "q1": q1, "q3": q3, "low": low, "high": high}


def median_interval(samples: list[float], level: float = 0.95) -> tuple[float, float]:
    """The samples between which the median of what they were drawn from lies, at this level.

    No distribution is assumed: each sample is below the median with a chance of one half. With
    fewer than six samples not even the smallest and the largest reach 0.95.
    """
    ordered, n = sorted(samples), len(samples)
    outside, cut = 0.0, 0
    while cut < (n - 1) // 2:
        outside += 2 * math.comb(n, cut) / 2**n
        if outside > 1 - level:
            break
        cut += 1
    first = max(cut - 1, 0)
    return ordered[first], ordered[n - 1 - first]


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high
