# SPDX-License-Identifier: Apache-2.0
"""Everything that the page shows of some adapters, read and measured, as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shira.adapter import Adapter
from shira.checkpoints import Checkpoint
from shira.cli._report.curve import Curve, log_folder, training_curve
from shira.cli._report.maps import Map, mask_map, side
from shira.cli.progress import track
from shira.cli.several import all_pairs, ranks, short_names
from shira.cli.summary import Summary, known_shapes, summarize
from shira.measure import Overlap, Rank


@dataclass(frozen=True)
class Described:
    """One adapter.

    Attributes:
        name: Short, told apart from the others.
        summary: As `shira inspect` has it.
        adapter: Its entries.
        maps: Of each weight.
        ranks: By weight; empty if they were left out.
        curve: Of its training; None without a log, or where several adapters share its folder.
    """

    name: str
    summary: Summary
    adapter: Adapter
    maps: tuple[Map, ...]
    ranks: dict[str, Rank]
    curve: Curve | None


@dataclass(frozen=True)
class Report:
    """Some adapters and all pairs of them."""

    adapters: tuple[Described, ...]
    pairs: tuple[Overlap, ...]


def gather(
    paths: Sequence[Path],
    base: Checkpoint | None = None,
    *,
    fast: bool = False,
    seed: int = 0,
    check_base: bool = True,
) -> Report:
    """Read and measure adapters.

    Args:
        paths: Folders or files, in any format that shira reads.
        base: The base model's checkpoint.
        fast: Leave out what takes the longer time: ranks, AWOM, AWOR.
        seed: Of estimates that draw.
        check_base: Refuse adapters of different base models.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        FileFormatError: If one is damaged or no adapter.
        ConfigError: If a file does not record the shapes of the weights, and no base is given.
        WrongBaseError: If adapters are of different base models, or ``base`` lacks a weight.
    """
    names = short_names([str(path) for path in paths])
    summaries = [summarize(path, base) for path in track(paths, "reading")]
    adapters = [
        Adapter.load(summary.path, base=known_shapes(summary, "a report")) for summary in summaries
    ]
    pairs = all_pairs(adapters, names, interference=not fast, seed=seed, check_base=check_base)
    measured: dict[str, dict[str, Rank]] = {name: {} for name in names}
    for name, parameter, rank in [] if fast else ranks(adapters, names, seed=seed):
        measured[name][parameter] = rank
    real = [path.resolve() for path in paths]
    folders = Counter(map(log_folder, set(real)))  # whose log is it, if several share a folder?
    most = side(sum(map(len, adapters)))
    return Report(
        tuple(
            Described(
                name=name,
                summary=summary,
                adapter=adapter,
                maps=tuple(mask_map(key, delta.support, most) for key, delta in adapter.items()),
                ranks=measured[name],
                curve=training_curve(summary.path) if folders[log_folder(path)] == 1 else None,
            )
            for name, path, summary, adapter in zip(names, real, summaries, adapters, strict=True)
        ),
        tuple(pairs),
    )
