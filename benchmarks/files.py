# SPDX-License-Identifier: Apache-2.0
"""Suite ``files``: bytes a parameter, and how fast indices are encoded and decoded.

*Bytes*: one adapter of several weights, saved in each format, dtype and coding; the whole file over
the number of trained entries. Beside them what PEFT's own SHiRA writes: float32 values and two
int32 for each.

*Coding*: the indices alone, of one weight: gaps at several densities, blocks, and the seed of a
random mask (which has to be drawn again). One thread; reading and writing of memory included, of
disks not.

*Whole files*: `Adapter.save` and `Adapter.load` with the page cache warm, checks and checksum
included, and loading mapped. Each round also writes the very bytes to new files and flushes them to
the disk, and reads them: the least that saving and loading can take, and what they are compared
with. The default, of masks that have no seed and no blocks, is there in large weights and in the
210 small ones of SmolLM2-135M.

Checked before timing: what is decoded is what was encoded; what is loaded is what was saved.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import environment, report
from benchmarks.timing import Laps, interleave, ratios, summary

NAME = "files"
SEED = 42


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    rows: int = field(default=4096, metadata={"help": "rows of each weight"})
    cols: int = field(default=4096, metadata={"help": "columns of each weight"})
    weights: int = field(default=8, metadata={"help": "weights of the adapter"})
    density: float = field(default=0.02, metadata={"help": "share of entries trained"})
    densities: str = field(
        default="0.005,0.01,0.02,0.04", metadata={"help": "densities of the coding, as X,Y"}
    )
    block_size: int = field(default=32, metadata={"help": "rows and columns of a block"})
    repeats: int = field(default=9, metadata={"help": "timed rounds"})


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check, weigh and time; the whole JSON document of the suite."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        surroundings = environment.describe()
        neighbours = environment.Neighbours()
        with tempfile.TemporaryDirectory() as folder:
            progress("files: saving in each format")
            sizes, answers = _weigh(settings, Path(folder))
            results = {
                "bytes_an_entry": sizes,
                "coding": _time_coding(settings, progress),
                "whole": _time_files(settings, Path(folder), progress),
            }
        surroundings["cpu_share_of_others"] = neighbours.share()
    finally:
        torch.set_num_threads(threads)
    return report.document(
        NAME, asdict(settings), surroundings, {"answers": answers, "results": results}
    )


FORMATS: dict[str, dict[str, Any]] = {
    "compact bf16, gaps": {"dtype": torch.bfloat16, "indices": "gaps"},
    "compact bf16, seed": {"dtype": torch.bfloat16, "indices": "seed"},
    "compact fp32, gaps": {"dtype": torch.float32, "indices": "gaps"},
    "compact int8, gaps": {"dtype": torch.int8, "indices": "gaps"},
    "compact int8, seed": {"dtype": torch.int8, "indices": "seed"},
    "compact bf16, blocks": {"dtype": torch.bfloat16, "indices": "blocks"},
    "PEFT format, bf16": {"format": "peft", "dtype": torch.bfloat16},
    "PEFT format, fp32": {"format": "peft", "dtype": torch.float32},
}
SMALL = [
    *((576, 576), (192, 576), (192, 576), (576, 576)),
    *((1536, 576), (1536, 576), (576, 1536)),
] * 30
"""The weights of SmolLM2-135M's 30 layers: attention, then MLP."""
STOCK = 12
"""Bytes that PEFT's own SHiRA writes for an entry: a float32 and two int32."""


def _adapter(
    settings: Settings, mask: str = "random", shapes: Sequence[tuple[int, int]] = ()
) -> Any:
    from shira import Adapter, SparseDelta
    from shira.masks import block_support, random_support

    generator = torch.Generator().manual_seed(SEED)
    deltas = {}
    shapes = shapes or [(settings.rows, settings.cols)] * settings.weights
    for number, shape in enumerate(shapes):
        k = round(settings.density * shape[0] * shape[1])
        name = f"model.layers.{number}.mlp.up_proj.weight"
        support = (
            block_support(shape, k, seed=SEED, name=name, block_size=settings.block_size)
            if mask == "block"
            else random_support(shape, k, seed=SEED, name=name)
        )
        values = torch.randn(k, generator=generator).mul_(1e-3).bfloat16()
        deltas[name] = SparseDelta(support, values)
    metadata = {"mask_type": mask, "random_seed": SEED, "base_model_name_or_path": "some/model"}
    return Adapter(deltas, metadata)


def _weigh(settings: Settings, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Bytes an entry of each format.

    Raises:
        RuntimeError: If what is loaded is not what was saved.
    """
    from shira import Adapter

    adapters = {mask: _adapter(settings, mask) for mask in ("random", "block")}
    sizes = {}
    for label, options in FORMATS.items():
        adapter = adapters["block" if options.get("indices") == "blocks" else "random"]
        path = folder / label
        adapter.save(path, **options)
        read = Adapter.load(path)
        for name, delta in adapter.items():
            exact = options["dtype"] == torch.int8 or torch.equal(
                read[name].values, delta.values.to(options["dtype"])
            )
            if not exact or read[name].support != delta.support:
                raise RuntimeError(f"{label}: {name} is not what was saved")
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        sizes[label] = sum(file.stat().st_size for file in files) / adapter.nnz
    sizes["PEFT's own SHiRA (by count)"] = STOCK
    return sizes, {"loaded_equals_saved": True, "entries": adapters["random"].nnz}


def _time_coding(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Million indices a second of each way to store them.

    Raises:
        RuntimeError: If what is decoded is not what was encoded.
    """
    from shira import blocks
    from shira.masks import block_support, random_support
    from shira.ops import gaps

    shape = (settings.rows, settings.cols)
    numel = settings.rows * settings.cols
    runs: dict[str, Callable[[], Laps]] = {}
    counts = {}
    for text in settings.densities.split(","):
        k = round(float(text) * numel)
        flat = random_support(shape, k, seed=SEED).indices.numpy()
        label = f"gaps, {100 * float(text):g} %"
        counts[label] = k, gaps.encode(flat).nbytes / k
        runs[label] = _laps(
            lambda flat=flat: gaps.encode(flat), lambda units: gaps.decode(units, numel), flat
        )
    k = round(settings.density * numel)
    squares = block_support(shape, k, seed=SEED, name="w", block_size=settings.block_size)
    flat = squares.indices.numpy()
    label = f"blocks of {settings.block_size}, {100 * settings.density:g} %"

    def find() -> tuple[Any, Any, Any]:
        found = blocks.find_blocks(shape, flat)
        if found is None:
            raise RuntimeError("the blocks of a block mask were not found")
        return found.size, gaps.encode(found.numbers), gaps.encode(found.rest)

    def expand(coded: tuple[Any, Any, Any]) -> Any:
        size, numbers, rest = coded
        down, across = blocks.grid(size, shape)
        numbers = gaps.decode(numbers, down * across).astype(np.int64)
        return blocks.expand(blocks.Blocks(size, numbers, gaps.decode(rest, numel)), shape)

    counts[label] = k, sum(units.nbytes for units in find()[1:]) / k
    runs[label] = _laps(find, expand, flat)
    seeded = random_support(shape, k, seed=SEED)
    label = f"seed, {100 * settings.density:g} %"
    counts[label] = k, 0.0
    runs[label] = _laps(
        lambda: None,
        lambda _: random_support(shape, k, seed=SEED).indices.numpy(),
        seeded.indices.numpy(),
    )
    kept = interleave(
        runs, settings.repeats, progress=lambda text: progress(f"files: coding, {text}")
    )
    return {
        label: {
            "indices": counts[label][0],
            "bytes_an_index": counts[label][1],
            **{
                f"{phase}_wall_seconds": _phase(laps, phase)
                for phase in ("encode", "decode")
                if not (phase == "encode" and label.startswith("seed"))
            },
        }
        for label, laps in kept.items()
    }


def _laps(encode: Callable[[], Any], decode: Callable[[Any], Any], flat: Any) -> Callable[[], Laps]:
    if not np.array_equal(decode(encode()), flat):
        raise RuntimeError("what is decoded is not what was encoded")

    def run() -> Laps:
        laps = Laps()
        coded = encode()
        laps.mark("encode")
        decode(coded)
        laps.mark("decode")
        return laps

    return run


def _time_files(
    settings: Settings, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    from shira import Adapter

    seeded, chosen = _adapter(settings), _adapter(settings, "magnitude")
    default: dict[str, Any] = {"dtype": torch.bfloat16}
    cases: dict[str, tuple[Any, dict[str, Any], bool]] = {
        "compact bf16, gaps": (chosen, default, False),
        "compact bf16, gaps, mapped": (chosen, default, True),
        "compact bf16, gaps, small weights": (
            _adapter(settings, "magnitude", SMALL),
            default,
            False,
        ),
        "compact bf16, seed": (seeded, FORMATS["compact bf16, seed"], False),
        "PEFT format, bf16": (chosen, FORMATS["PEFT format, bf16"], False),
    }
    sizes = {}

    def timed(label: str) -> Laps:
        adapter, options, mapped = cases[label]
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            path = Path(inner, "adapter")
            adapter.save(path, **options)  # what is timed replaces it, as saving mostly does
            laps = Laps()
            adapter.save(path, **options)
            laps.mark("save")
            Adapter.load(path, mapped=mapped)
            laps.mark("load")
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            contents = [file.read_bytes() for file in files]
            laps.mark("read")
            for number, content in enumerate(contents):
                with open(Path(inner, str(number)), "xb", buffering=0) as file:
                    file.write(content)
                    os.fsync(file.fileno())
            laps.mark("write")
        sizes[label] = sum(map(len, contents))
        return laps

    kept = interleave(
        {label: partial(timed, label) for label in cases},
        settings.repeats,
        progress=lambda text: progress(f"files: whole files, {text}"),
    )
    return {
        label: {
            "entries": cases[label][0].nnz,
            "bytes": sizes[label],
            **{f"{phase}_wall_seconds": _phase(laps, phase) for phase in laps[0].phases},
            **{
                f"{phase}_over_{reference}": {
                    kind: ratios(_seconds(laps, phase, kind), _seconds(laps, reference, kind))
                    for kind in ("wall", "cpu")
                }
                for phase, reference in (("save", "write"), ("load", "write"), ("load", "read"))
            },
        }
        for label, laps in kept.items()
    }


def _seconds(laps: list[Laps], phase: str, kind: str) -> list[float]:
    return [getattr(lap.phases[phase], kind) for lap in laps]


def _phase(laps: list[Laps], phase: str) -> dict[str, Any]:
    samples = _seconds(laps, phase, "wall")
    return {**summary(samples), "samples": samples}


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    settings, found = result["settings"], result["results"]
    what = (
        f"{settings['weights']} weights of {settings['rows']} x {settings['cols']}, density "
        f"{100 * settings['density']:g} %"
    )
    sizes = report.Table(
        f"Files: {what}",
        ["format", "bytes an entry"],
        [[label, f"{size:.3f}"] for label, size in found["bytes_an_entry"].items()],
    )
    coding = report.Table(
        "Coding of indices, one thread, million a second",
        ["coding", "bytes an index", "encode median", "best", "decode median", "best"],
        notes=report.busy_note(result),
    )
    for label, row in found["coding"].items():
        cells = [label, f"{row['bytes_an_index']:.3f}"]
        for phase in ("encode", "decode"):
            seconds = row.get(f"{phase}_wall_seconds")
            for figure in ("median", "min"):
                cells.append(f"{row['indices'] / seconds[figure] / 1e6:.0f}" if seconds else "-")
        coding.rows.append(cells)
    whole = report.Table(
        f"Whole files, one thread: {result['answers']['entries'] / 1e6:.2f} million entries",
        ["format", "save ms", "load ms", "million entries a second loaded"],
    )
    floor = report.Table(
        "Saving and loading over writing and flushing the very bytes: least seconds, and median of "
        "the rounds",
        ["format", "MB/s written", "save", "median", "CPU", "load", "median", "load over reading"],
        notes=report.busy_note(result),
    )
    for label, row in found["whole"].items():
        save, load = (row[f"{phase}_wall_seconds"]["median"] for phase in ("save", "load"))
        entries = row.get("entries", result["answers"]["entries"])
        whole.rows.append(
            [label, f"{1e3 * save:.1f}", f"{1e3 * load:.1f}", f"{entries / load / 1e6:.0f}"]
        )
        if "save_over_write" in row:
            over, loaded = row["save_over_write"], row["load_over_write"]["wall"]
            floor.rows.append(
                [
                    label,
                    f"{row['bytes'] / row['write_wall_seconds']['median'] / 1e6:.0f}",
                    *(f"{over['wall'][figure]:.2f}" for figure in ("of_min", "median")),
                    f"{over['cpu']['median']:.2f}",
                    *(f"{loaded[figure]:.2f}" for figure in ("of_min", "median")),
                    f"{row['load_over_read']['wall']['median']:.1f}",
                ]
            )
    return [sizes, coding, whole, *([floor] if floor.rows else [])]
