# SPDX-License-Identifier: Apache-2.0
"""Suite ``fusing``: two adapters of one weight made one, and compared.

*Methods*: each method of ``shira.fuse`` on two random adapters (4096 x 4096, 2 %), beside the same
done on dense tensors: PEFT's ``merge_utils`` for TIES, and a plain weighted sum, which is the least
that a dense fusion can cost. All take turns.

*Growth*: the same number of entries in ever larger weights; time should not grow.

*Looking*: ``overlap`` without and with AWOM and AWOR.

Checked before timing: the sum equals the dense sum bit for bit, TIES equals PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import environment, report
from benchmarks.timing import Laps, interleave, ratios, summary

NAME = "fusing"
SEED = 42
WEIGHTS = [0.7, 0.3]


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    width: int = field(default=4096, metadata={"help": "rows and columns of the weight"})
    density: float = field(default=0.02, metadata={"help": "share of its entries, each adapter"})
    repeats: int = field(default=7, metadata={"help": "timed rounds"})
    threads: int = field(default=0, metadata={"help": "torch threads; 0: torch's own choice"})


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check and time; the whole JSON document of the suite."""
    from shira import fuse, overlap
    from shira.fusing import METHODS

    if settings.threads:
        torch.set_num_threads(settings.threads)
    surroundings = environment.describe()
    progress("fusing: comparing the answers")
    answers = check_answers()
    neighbours = environment.Neighbours()
    k = round(settings.density * settings.width**2)
    pair = [_adapter(settings.width, k, seed) for seed in range(2)]
    dense = [_dense(adapter) for adapter in pair]
    contenders = {name: _fusing(pair, name) for name in METHODS}
    contenders["dense sum"] = lambda: dense[0] * WEIGHTS[0] + dense[1] * WEIGHTS[1]
    contenders["dense ties (PEFT)"] = lambda: _peft_ties(dense)
    methods = _timed(contenders, settings, "dense sum", progress)
    sizes = [settings.width // 2, settings.width, settings.width * 2, settings.width * 4]
    pairs = {size: [_adapter(size, k, seed) for seed in range(2)] for size in sizes}
    growth = _timed(
        {f"{size} x {size}": _fusing(pairs[size], "sum") for size in sizes},
        settings,
        f"{settings.width} x {settings.width}",
        progress,
    )
    looking = _timed(
        {
            "fuse": lambda: fuse(pair),
            "overlap, positions and values": lambda: overlap(*pair, interference=False),
            "overlap, with AWOM and AWOR": lambda: overlap(*pair),
        },
        settings,
        "fuse",
        progress,
    )
    surroundings["cpu_share_of_others"] = neighbours.share()
    results = {"k": k, "methods": methods, "growth": growth, "looking": looking}
    body = {"answers": answers, "results": results}
    return report.document(NAME, asdict(settings), surroundings, body)


def check_answers() -> dict[str, Any]:
    """The same figures on dense tensors.

    Raises:
        RuntimeError: If ours are others.
    """
    from shira import fuse

    pair = [_adapter(128, 700, seed) for seed in range(2)]
    dense = [_dense(adapter) for adapter in pair]
    if not torch.equal(_dense(fuse(pair, WEIGHTS)), dense[0] * WEIGHTS[0] + dense[1] * WEIGHTS[1]):
        raise RuntimeError("the sum is not the dense sum")
    if not torch.equal(_dense(fuse(pair, WEIGHTS, "ties")), _peft_ties(dense)):
        raise RuntimeError("TIES is not PEFT's on dense tensors")
    return {"sum_equals_dense_bit_for_bit": True, "ties_equals_peft": True}


def _adapter(width: int, k: int, seed: int) -> Any:
    from shira import Adapter, SparseDelta
    from shira.masks import random_support

    support = random_support((width, width), k, seed=SEED + seed)
    values = torch.randn(k, generator=torch.Generator().manual_seed(seed))
    return Adapter({"weight": SparseDelta(support, values)})


def _dense(adapter: Any) -> torch.Tensor:
    delta = adapter["weight"]
    made = torch.zeros(delta.support.numel)
    made[delta.support.indices.long()] = delta.values
    return made.view(delta.support.shape)


def _peft_ties(dense: list[torch.Tensor]) -> torch.Tensor:
    from peft.utils import merge_utils

    stacked = torch.stack(dense)
    mask = merge_utils.calculate_majority_sign_mask(stacked)
    factors = torch.tensor(WEIGHTS).view(-1, 1, 1)
    return merge_utils.disjoint_merge(stacked * factors, mask)


def _fusing(pair: list[Any], method: str) -> Callable[[], Any]:
    from shira import fuse

    return lambda: fuse(pair, WEIGHTS, method)


def _timed(
    contenders: dict[str, Callable[[], Any]],
    settings: Settings,
    reference: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    def run(work: Callable[[], Any]) -> Callable[[], Laps]:
        def once() -> Laps:
            laps = Laps()
            work()
            laps.mark("all")
            return laps

        return once

    laps = interleave(
        {name: run(work) for name, work in contenders.items()},
        settings.repeats,
        progress=lambda text: progress(f"fusing: {text}"),
    )
    samples = {name: [lap.phases["all"].wall for lap in of] for name, of in laps.items()}
    return {
        name: {
            "seconds": {**summary(seconds), "samples": seconds},
            "over_reference": ratios(seconds, samples[reference]),
        }
        for name, seconds in samples.items()
    }


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    settings, results = result["settings"], result["results"]
    titles = {
        "methods": ("dense sum", f"Two adapters of {results['k']:,} entries in one weight"),
        "growth": (
            f"{settings['width']} x {settings['width']}",
            f"The sum of two adapters of {results['k']:,} entries, in weights of several sizes",
        ),
        "looking": ("fuse", "Looking at the two"),
    }
    made = []
    for key, (reference, title) in titles.items():
        table = report.Table(
            title,
            ["what", "ms, least", "ms, median", f"x {reference}, median [quartiles]"],
            notes=report.busy_note(result),
        )
        for name, row in results[key].items():
            seconds, ratio = row["seconds"], row["over_reference"]
            table.rows.append(
                [
                    name,
                    f"{1e3 * seconds['min']:.1f}",
                    f"{1e3 * seconds['median']:.1f}",
                    f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                ]
            )
        made.append(table)
    return made
