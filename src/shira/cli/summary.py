# SPDX-License-Identifier: Apache-2.0
"""A summary of an adapter: what `shira inspect` prints and writes as JSON, and a report shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD, Verdict, judge
from shira.checkpoints import FLOATS, Checkpoint, shapes_of
from shira.checkpoints.entries import read_entries
from shira.checkpoints.models import locate_deltas
from shira.cli.figures import Figures, vanishing
from shira.cli.options import check_paths
from shira.cli.output import file_bytes, megabytes, shape_text, share, whole_tensors
from shira.errors import ConfigError
from shira.masks import MASK_FIELDS
from shira.store import PeftFile, is_compact, read_compact, read_peft, to_adapter

BASE_FIELD = "base_model_name_or_path"
NEEDS_BASE = "needs --base"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Target:
    """One adapted weight.

    Attributes:
        name: The base model's own parameter name.
        shape: Of the weight; None where the file does not say and no base was given.
        nnz: Number of its entries that the adapter changes (k).
        dtype: Of the values, as ``"float32"``.
        figures: Of the values.
        fingerprint: Hash that the file records of the base values at the entries.
        vanishing: Deltas that a bfloat16 base swallows; None without the base.
        base: Verdict on the base that was given; None without one.
        indices: Coding of the indices in a compact file: ``"gaps"``, ``"blocks"``, ``"seed"``.
        count: Number of like weights that it stands for.
    """

    name: str
    shape: tuple[int, ...] | None
    nnz: int
    dtype: str
    figures: Figures
    fingerprint: str | None = None
    vanishing: int | None = None
    base: Verdict | None = None
    indices: str | None = None
    count: int = 1

    @property
    def numel(self) -> int | None:
        """Entries of the weight, or of all that it stands for."""
        return None if self.shape is None else prod(self.shape) * self.count

    @property
    def density(self) -> float | None:
        """nnz / numel."""
        return self.nnz / self.numel if self.numel else None

    def as_json(self) -> dict[str, Any]:
        """Return everything, in what JSON can hold."""
        return {
            "name": self.name,
            "shape": self.shape,
            "nnz": self.nnz,
            "density": self.density,
            "dtype": self.dtype,
            "indices": self.indices,
            "values": self.figures.summary(),
            "vanishing_in_bfloat16": self.vanishing,
            "base_fingerprint": self.fingerprint,
            "base": self.base,
        }

    def cells(self) -> dict[str, str]:
        """Return its row of a table, by column."""
        figures = {name: _number(value) for name, value in self.figures.summary().items()}
        return {
            "weight": self.name,
            "weights": str(self.count),
            "shape": shape_text(self.shape),
            "k": f"{self.nnz:,}",
            "density": _percent(self.density),
            "dtype": self.dtype,
            "min": figures["min"],
            "max": figures["max"],
            "mean abs": figures["mean_abs"],
            "std": figures["std"],
            "zeros": f"{self.figures.zeros:,}",
            "lost in bf16": "?" if self.vanishing is None else f"{self.vanishing:,}",
        }


TEXT_COLUMNS = ("weight", "shape", "dtype")
"""Columns of `Target.cells` that hold no number."""


@dataclass(frozen=True)
class Summary:
    """An adapter: where it lies, its targets, its whole tensors, and what its config says."""

    path: Path
    format: str
    file_bytes: int
    targets: tuple[Target, ...]
    metadata: Mapping[str, Any]
    base: str | None
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    library: str | None = None

    @property
    def all(self) -> Target:
        """The targets as one."""
        return together("", self.targets)

    @property
    def nnz(self) -> int:
        """Entries in all."""
        return sum(target.nnz for target in self.targets)

    @property
    def density(self) -> float | None:
        """Entries over the entries of the weights; None where a shape is not known."""
        sizes = [target.numel for target in self.targets]
        if not sizes or None in sizes:
            return None
        return self.nnz / max(sum(size for size in sizes if size is not None), 1)

    @property
    def unlike_base(self) -> list[str] | None:
        """Targets whose base values are not those of the base given; None if none can be told."""
        if not {t.base for t in self.targets} & {"same", "same after rounding", "another"}:
            return None
        return [target.name for target in self.targets if target.base == "another"]

    def as_json(self) -> dict[str, Any]:
        """Return everything, in what JSON can hold; unknown figures are null."""
        return {
            "path": str(self.path),
            "format": self.format,
            "written_by": self.library,
            "file_bytes": self.file_bytes,
            "parameters": len(self.targets),
            "nnz": self.nnz,
            "density": self.density,
            "dtypes": sorted({target.dtype for target in self.targets}),
            "mask": {name: self.metadata.get(name) for name in MASK_FIELDS},
            "values": self.all.figures.summary(),
            "vanishing_in_bfloat16": self.all.vanishing,
            "base": {
                "recorded": self.metadata.get(BASE_FIELD),
                "compared_with": self.base,
                "targets_unlike": self.unlike_base,
            },
            "targets": [target.as_json() for target in self.targets],
            "whole_tensors": {
                name: {"shape": list(t.shape), "dtype": _dtype(t), "bytes": t.nbytes}
                for name, t in self.whole.items()
            },
            "config": {
                name: value
                for name, value in self.metadata.items()
                if name not in (FINGERPRINT_FIELD, ROUNDED_FIELD)
            },
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield a name and a text for each thing to know; no name: more of the line before."""
        every = self.all
        cells = every.cells()
        sparse = self.file_bytes - sum(tensor.nbytes for tensor in self.whole.values())
        each = f", {sparse / self.nnz:.2f} bytes an entry" if self.nnz else ""
        yield "format", f"{self.format}, {megabytes(self.file_bytes)}{each}"
        if self.library is not None:
            codings = Counter(target.indices for target in self.targets)
            yield "written by", self.library
            yield "indices as", ", ".join(f"{way} ({n} weights)" for way, n in codings.items())
        density = _percent(self.density, NEEDS_BASE)
        yield "entries", f"{self.nnz:,} in {len(self.targets)} weights, density {density}"
        yield "values", ", ".join(sorted({target.dtype for target in self.targets}))
        yield (
            "",
            f"min {cells['min']}, max {cells['max']}, mean absolute {cells['mean abs']}, "
            f"std {cells['std']}, {cells['zeros']} zeros",
        )
        changes = self.nnz - every.figures.zeros
        lost = every.vanishing
        told = NEEDS_BASE if lost is None else share(lost, changes, "deltas other than zero")
        yield "lost in bfloat16", told
        yield "mask", self.mask
        yield "base", str(self.metadata.get(BASE_FIELD) or "not recorded")
        prints = sum(target.fingerprint is not None for target in self.targets)
        yield "base fingerprint", f"of {prints} weights" if prints else "not recorded"
        if self.base is not None:
            yield "", f"{self.base} {self._about_base()}"
        for at, (name, tensor) in enumerate(whole_tensors(self.whole).items()):
            yield "" if at else "whole tensors", f"{name}: {tensor}"

    @property
    def mask(self) -> str:
        """The fields of the mask that are recorded; a density takes the place of r."""
        given = {name: self.metadata.get(name) for name in MASK_FIELDS}
        if given["density"] is not None:
            given["r"] = None
        known = [f"{name} {value}" for name, value in given.items() if value is not None]
        return ", ".join(known) or "not recorded"

    def _about_base(self) -> str:
        unlike = self.unlike_base
        if unlike:
            return f"is ANOTHER base: {len(unlike)} weights differ, such as {unlike[0]}"
        verdicts = Counter(target.base for target in self.targets)
        if set(verdicts) <= {"same", "same after rounding"}:
            rounded = verdicts["same after rounding"]
            return f"is the same base{' after rounding' if rounded else ''}"
        return "as the base: " + ", ".join(f"{count} {told}" for told, count in verdicts.items())


def without_number(name: str) -> str:
    """Return a parameter's name with ``*`` for the number of its layer."""
    return _NUMBER.sub("*", name)


def together(name: str, targets: tuple[Target, ...]) -> Target:
    """Return several targets as one of the shape and dtype of the first, with counts added up."""
    first = targets[0] if targets else Target(name, None, 0, "-", Figures())
    lost = [target.vanishing for target in targets]
    return replace(
        first,
        name=name,
        nnz=sum(target.nnz for target in targets),
        figures=sum((target.figures for target in targets), Figures()),
        vanishing=sum(n for n in lost if n is not None) if lost and None not in lost else None,
        count=len(targets),
    )


def summarize(path: Path, base: Checkpoint | None = None) -> Summary:
    """Read an adapter and describe it.

    Args:
        path: A folder or file in any format that shira reads.
        base: The base model's checkpoint, for what cannot be known without it.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If it is damaged or no adapter.
        WrongBaseError: If ``base`` lacks a weight that the adapter changes.
    """
    check_paths([path])
    where = None if base is None else str(base.path)
    if is_compact(path):
        compact = read_compact(path)
        adapter, records = compact.adapter, compact.records
        targets = tuple(
            replace(
                target,
                dtype="int8" if records[target.name].values == "I8" else target.dtype,
                indices=records[target.name].indices,
            )
            for target in _targets(adapter, adapter.metadata, base)
        )
        size, library = file_bytes(compact.path), compact.library
        metadata, whole = adapter.metadata, adapter.tensors
        return Summary(path, "compact", size, targets, metadata, where, whole, library)
    file = read_peft(path)
    names = [raw.weight_name for raw in file.tensors.values()]
    shapes = file.shapes if base is None else shapes_of(base, names)
    if shapes is None:
        targets, whole = tuple(_without_shapes(file)), {**file.whole, **file.copies}
    else:
        adapter = to_adapter(file, shapes)
        targets, whole = tuple(_targets(adapter, file.config, base)), adapter.tensors
    size = file_bytes(file.path)
    return Summary(path, "PEFT", size, targets, file.metadata, where, whole)


def known_shapes(summary: Summary, what: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each target; refuse ``what`` if one is not known."""
    shapes = {target.name: target.shape for target in summary.targets}
    unknown = [name for name, shape in shapes.items() if shape is None]
    if unknown:
        raise ConfigError(
            f"{what} needs the shape of {unknown[0]!r}, which the file does not record; give the "
            "base model with --base"
        )
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _targets(
    adapter: Adapter, metadata: Mapping[str, Any], base: Checkpoint | None
) -> Iterator[Target]:
    recorded = metadata.get(FINGERPRINT_FIELD) or {}
    stored = {} if base is None else locate_deltas(adapter, base)[0]
    for name, delta in adapter.items():
        lost = verdict = None
        if name in stored:
            values = None
            if stored[name].dtype in FLOATS:
                values = read_entries(stored[name], delta.support.indices.cpu())
            lost = None if values is None else vanishing(values, delta.values)
            verdict = judge(metadata, name, delta.values, values)
        yield Target(
            name=name,
            shape=tuple(delta.support.shape),
            nnz=delta.nnz,
            dtype=_dtype(delta.values),
            figures=Figures.of(delta.values),
            fingerprint=recorded.get(name),
            vanishing=lost,
            base=verdict,
        )


def _without_shapes(file: PeftFile) -> Iterator[Target]:
    """Yield targets of a file that does not record shapes, as stock PEFT's never do."""
    for raw in file.tensors.values():
        yield Target(raw.weight_name, None, raw.nnz, _dtype(raw.values), Figures.of(raw.values))


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(share: float | None, unknown: str = "?") -> str:
    return unknown if share is None else f"{share:.2%}"
