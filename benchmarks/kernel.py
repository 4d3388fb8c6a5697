# SPDX-License-Identifier: Apache-2.0
"""Suite ``kernel``: the weight gradient of one layer at its support, by every backend.

For each shape, interleaved: ``native`` and ``sampled`` at random entries, ``tiles`` at as many
entries in blocks, ``chunked`` (a dense product in pieces, gathered), and the two products of the
frozen layer (``x W^T`` and ``g W``) that the step takes anyway. The two products run before each
measurement, so that the operands lie where a training step leaves them, not in the nearest cache.

Beside it stands the roofline of this machine (``roofline.py``). Checked before timing: every
backend gives the dense product's entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, report, roofline
from benchmarks.timing import Laps, interleave, ratios, summary

NAME = "kernel"
TOLERANCE = 1e-5
RANDOM = ("native", "sampled", "chunked")


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    shapes: str = field(
        default="1024x1024,2816x1024,1024x2816,2048x2048,5632x2048",
        metadata={"help": "ROWSxCOLUMNS of the weights, separated by commas"},
    )
    tokens: int = field(default=1024, metadata={"help": "tokens in a batch"})
    density: float = field(default=0.02, metadata={"help": "trained share of the weight"})
    dtype: str = field(default="float32", metadata={"help": "of the operands"})
    repeats: int = field(default=21, metadata={"help": "timed rounds"})


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check and time every shape; the whole JSON document of the suite."""
    surroundings = environment.describe()
    neighbours = environment.Neighbours()
    results, worst = {}, 0.0
    for shape in settings.shapes.split(","):
        m, n = map(int, shape.split("x"))
        progress(f"kernel: {shape}")
        results[shape], error = _shape(settings, m, n)
        worst = max(worst, error)
    surroundings["cpu_share_of_others"] = neighbours.share()
    body = {"answers": {"tolerance": TOLERANCE, "largest_error": worst}, "results": results}
    rates = roofline.highest(*(roofline.Rates(**row["rates"]) for row in results.values()))
    body["rates"] = rates._asdict()
    return report.document(NAME, asdict(settings), surroundings, body)


def _shape(s: Settings, m: int, n: int) -> tuple[dict[str, Any], float]:
    from shira.masks import block_support, random_support
    from shira.ops import make_plan, use_backend, weight_gradient

    dtype = getattr(torch, s.dtype)
    generator = torch.Generator().manual_seed(0)
    x, g, w = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((s.tokens, n), (s.tokens, m), (m, n))
    )
    k = round(m * n * s.density)
    supports = {
        "random": random_support((m, n), k, seed=0),
        "block": block_support((m, n), k, seed=0),
    }
    plans = {name: make_plan([at.coordinates()], (m, n), (n, 1)) for name, at in supports.items()}

    def gradient(backend: str) -> Tensor:
        with use_backend(backend):
            return weight_gradient(g, x, plans["block" if backend == "tiles" else "random"])

    def products() -> None:
        x @ w.t()
        g @ w

    dense = (g.float().t() @ x.float()).view(-1)
    worst = 0.0
    for backend in (*RANDOM, "tiles"):
        want = dense[supports["block" if backend == "tiles" else "random"].indices.long()]
        error = ((gradient(backend) - want).norm() / want.norm()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"{backend} is off by {error} on {m} x {n}")
        worst = max(worst, error)

    runs = {"products": partial(_timed, products, products)}
    for backend in (*RANDOM, "tiles"):
        runs[backend] = partial(_timed, products, partial(gradient, backend))
    # a machine that is shared is not as fast at one time as at another: its rates of this minute
    before = roofline.measure()
    laps = interleave(runs, s.repeats)
    rates = roofline.highest(before, roofline.measure())
    floor = [lap.total.wall for lap in laps["products"]]
    least = roofline.least_seconds(rates, m, n, s.tokens, k, x.element_size())
    rows: dict[str, Any] = {"k": k, "roofline_seconds": least, "rates": rates._asdict()}
    for name, taken in laps.items():
        wall = [lap.total.wall for lap in taken]
        rows[name] = {
            **summary(wall),
            "over_products": ratios(wall, floor),
            "gflops": None if name == "products" else 2 * k * s.tokens / min(wall) / 1e9,
        }
    return rows, worst


def _timed(before: Callable[[], object], work: Callable[[], object]) -> Laps:
    before()
    laps = Laps()
    work()
    laps.mark("work")
    return laps


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The table that is printed."""
    s, rates = result["settings"], result["rates"]
    table = report.Table(
        f"Weight gradient at {100 * s['density']:.3g} % of the entries, {s['tokens']} tokens, "
        f"{s['dtype']}: ms (min), in brackets x the layer's two products",
        [
            "shape",
            "products",
            *RANDOM,
            "tiles",
            "native GFLOP/s",
            "roofline ms",
            "native / roofline",
        ],
        notes=[
            f"Measured rates at best: cache {rates['cache_bytes'] / 1e9:.0f} GB/s, memory "
            f"{rates['memory_bytes'] / 1e9:.0f} GB/s, product {rates['flops'] / 1e9:.0f} GFLOP/s; "
            "each roofline is by the rates of the same minute.",
            *report.busy_note(result),
        ],
    )
    for shape, row in result["results"].items():
        cells = [f"{1e3 * row['products']['min']:.2f}"]
        for name in (*RANDOM, "tiles"):
            cells.append(
                f"{1e3 * row[name]['min']:.2f} ({row[name]['over_products']['of_min']:.3f})"
            )
        least = row["roofline_seconds"]
        cells += [f"{row['native']['gflops']:.0f}", f"{1e3 * least:.2f}"]
        table.rows.append([shape, *cells, f"{row['native']['min'] / least:.2f}"])
    return [table]
