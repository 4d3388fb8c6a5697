# SPDX-License-Identifier: Apache-2.0
"""A summary of an adapter: what `shira inspect` prints and writes as JSON, and a report shows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD, Verdict, judge, replacement
from shira.checkpoints import FLOATS, Checkpoint, shapes_of
from shira.checkpoints.entries import read_entries
from shira.checkpoints.locating import locate_deltas, without_tied
from shira.cli.options import check_paths
from shira.cli.output import dtype_text, file_bytes, megabytes, of_deltas, shape_text, whole_tensors
from shira.errors import ConfigError
from shira.masks import MASK_FIELDS
from shira.store import is_compact, read_compact, read_peft, to_adapter
from shira.store.table import Record

BASE_FIELD = "base_model_name_or_path"
TEXT_COLUMNS = ("weight", "shape", "dtype")
"""Columns of `Target.cells` that hold no number."""

_HASHES = (FINGERPRINT_FIELD, ROUNDED_FIELD)
_NEEDS_BASE = "needs --base"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Figures:
    """Figures of some values, with the population's standard deviation; None if there are none."""

    min: float | None = None
    max: float | None = None
    mean_abs: float | None = None
    std: float | None = None
    zeros: int = 0

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Figures:
        """Return the figures of finite values ``(k,)`` in one tensor or more, made in float64.

        They are divided by the largest first, as float64 does not hold the squares of all values.
        """
        parts = [part.detach() for part in parts if part.numel()]
        if not parts:
            return cls()
        low, high = min(float(p.min()) for p in parts), max(float(p.max()) for p in parts)
        reach = max(-low, high) or 1.0
        sums = torch.zeros(3, dtype=torch.float64)
        for part in parts:
            shares = part.double() / reach
            sums += torch.stack([shares.sum(), shares.abs().sum(), shares.square().sum()])
        mean, mean_abs, mean_square = (sums / sum(map(len, parts))).tolist()
        deviation = math.sqrt(min(max(mean_square - mean**2, 0.0), 1.0))
        zeros = sum(int((part == 0).sum()) for part in parts)
        return cls(low, high, reach * min(mean_abs, 1.0), reach * deviation, zeros)


def vanishing(base: Tensor, delta: Tensor) -> int:
    """Count the deltas other than zero that change nothing in a copy of the base in bfloat16."""
    rounded = base.to(torch.bfloat16)
    return int(((replacement(rounded, delta) == rounded) & (delta != 0)).sum())


@dataclass(frozen=True)
class Target:
    """One adapted weight, or several like ones; what the base tells is None without it."""

    name: str
    shape: tuple[int, ...] | None  # None also where the file does not say
    dtype: str  # of the stored values
    values: tuple[Tensor, ...]  # of each weight
    fingerprint: str | None = None  # of the base's values, as recorded
    vanishing: int | None = None  # deltas that a bfloat16 base swallows
    base: Verdict | None = None
    indices: str | None = None  # their coding in a compact file

    @cached_property
    def figures(self) -> Figures:
        """Figures of all values."""
        return Figures.of(self.values)

    @property
    def nnz(self) -> int:
        """Number of entries that the adapter changes."""
        return sum(map(len, self.values))

    @property
    def density(self) -> float | None:
        """Share of the weight's entries; None where its shape is not known."""
        numel = 0 if self.shape is None else math.prod(self.shape) * len(self.values)
        return self.nnz / numel if numel else None

    def as_json(self) -> dict[str, Any]:
        """Return everything, in what JSON can hold."""
        return {
            "name": self.name,
            "shape": self.shape,
            "nnz": self.nnz,
            "density": self.density,
            "dtype": self.dtype,
            "indices": self.indices,
            "values": asdict(self.figures),
            "vanishing_in_bfloat16": self.vanishing,
            "base_fingerprint": self.fingerprint,
            "base": self.base,
        }

    def cells(self) -> dict[str, str]:
        """Return its row of a table, by column."""
        figures = self.figures
        return {
            "weight": self.name,
            "weights": str(len(self.values)),
            "shape": shape_text(self.shape),
            "k": f"{self.nnz:,}",
            "density": _text(self.density, ".2%", "?"),
            "dtype": self.dtype,
            "min": _text(figures.min, ".3g", "-"),
            "max": _text(figures.max, ".3g", "-"),
            "mean abs": _text(figures.mean_abs, ".3g", "-"),
            "std": _text(figures.std, ".3g", "-"),
            "zeros": f"{figures.zeros:,}",
            "lost in bf16": _text(self.vanishing, ",", "?"),
        }


@dataclass(frozen=True)
class Summary:
    """An adapter: where it lies, its targets, its whole tensors, and what its config says."""

    path: Path
    format: str
    file_bytes: int
    targets: Sequence[Target]
    metadata: Mapping[str, Any]
    whole: Mapping[str, Tensor]
    adapter: Adapter | None  # None if the shapes of its weights are not known
    base: Path | None
    library: str | None = None

    @cached_property
    def all(self) -> Target:
        """The targets as one."""
        return together("", self.targets)

    @property
    def density(self) -> float | None:
        """Entries over the entries of the weights; None where a shape is not known."""
        return self.adapter.density if self.adapter else None

    @property
    def unlike_base(self) -> list[str] | None:
        """Targets whose base values are not those of the base given; None if none can be told."""
        if not {t.base for t in self.targets} & {"same", "same after rounding", "another"}:
            return None
        return [target.name for target in self.targets if target.base == "another"]

    def required_adapter(self, what: str) -> Adapter:
        """Return the adapter; refuse ``what`` if a shape is not known."""
        if self.adapter is None:
            raise ConfigError(
                f"{what} needs the shape of {self.targets[0].name!r}, which the file does not "
                "record; give the base model with --base"
            )
        return self.adapter

    def as_json(self) -> dict[str, Any]:
        """Return everything, in what JSON can hold; unknown figures are null."""
        return {
            "path": str(self.path),
            "format": self.format,
            "written_by": self.library,
            "file_bytes": self.file_bytes,
            "parameters": len(self.targets),
            "nnz": self.all.nnz,
            "density": self.density,
            "dtypes": sorted({target.dtype for target in self.targets}),
            "mask": {name: self.metadata.get(name) for name in MASK_FIELDS},
            "values": asdict(self.all.figures),
            "vanishing_in_bfloat16": self.all.vanishing,
            "base": {
                "recorded": self.metadata.get(BASE_FIELD),
                "compared_with": None if self.base is None else str(self.base),
                "targets_unlike": self.unlike_base,
            },
            "targets": [target.as_json() for target in self.targets],
            "whole_tensors": {
                name: {"shape": list(t.shape), "dtype": dtype_text(t), "bytes": t.nbytes}
                for name, t in self.whole.items()
            },
            "config": {n: value for n, value in self.metadata.items() if n not in _HASHES},
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield a name and a text for each thing to know; no name: more of the line before."""
        nnz, cells, lost = self.all.nnz, self.all.cells(), self.all.vanishing
        sparse = self.file_bytes - sum(tensor.nbytes for tensor in self.whole.values())
        each = f", {sparse / nnz:.2f} bytes an entry" if nnz else ""
        yield "format", f"{self.format}, {megabytes(self.file_bytes)}{each}"
        if self.library is not None:
            codings = Counter(target.indices for target in self.targets)
            yield "written by", self.library
            yield "indices as", ", ".join(f"{way} ({n} weights)" for way, n in codings.items())
        density = _text(self.density, ".2%", _NEEDS_BASE)
        yield "entries", f"{nnz:,} in {len(self.targets)} weights, density {density}"
        yield "values", ", ".join(sorted({target.dtype for target in self.targets}))
        columns = ("min", "max", "mean abs", "std", "zeros")
        yield "", ", ".join(f"{column} {cells[column]}" for column in columns)
        changes = nnz - self.all.figures.zeros
        yield "lost in bfloat16", _NEEDS_BASE if lost is None else of_deltas(lost, changes)
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
        unlike, verdicts = self.unlike_base, Counter(target.base for target in self.targets)
        if unlike:
            return f"is ANOTHER base: {len(unlike)} weights differ, such as {unlike[0]}"
        if verdicts.keys() <= {"same", "same after rounding"}:
            return "is the same base" + " after rounding" * ("same after rounding" in verdicts)
        return "as the base: " + ", ".join(f"{count} {told}" for told, count in verdicts.items())


def without_number(name: str) -> str:
    """Return a parameter's name with ``*`` for the number of its layer."""
    return _NUMBER.sub("*", name)


def together(name: str, targets: Sequence[Target]) -> Target:
    """Return several targets as one, of the shape and dtype of the first."""
    first = targets[0] if targets else Target(name, None, "-", ())
    lost = [target.vanishing for target in targets]
    return replace(
        first,
        name=name,
        values=tuple(values for target in targets for values in target.values),
        vanishing=sum(filter(None, lost)) if lost and None not in lost else None,
    )


def summarize(path: Path, base: Checkpoint | None = None) -> Summary:
    """Read an adapter and describe it; the base tells what cannot be known without it."""
    check_paths([path])
    where = None if base is None else base.path
    if is_compact(path):
        read = read_compact(path)
        adapter, size = read.adapter, file_bytes(read.path)
        targets, whole = _targets(adapter, base, read.records), adapter.tensors
        return Summary(
            path, "compact", size, targets, adapter.metadata, whole, adapter, where, read.library
        )
    file = read_peft(path)
    names = [raw.weight_name for raw in file.tensors.values()]
    shapes = file.shapes if base is None else shapes_of(base, names)
    size = file_bytes(file.path)
    if shapes is None:  # as in stock PEFT's files
        targets = [
            Target(raw.weight_name, None, dtype_text(raw.values), (raw.values,))
            for raw in file.tensors.values()
        ]
        whole = {**file.whole, **file.copies}
        return Summary(path, "PEFT", size, targets, file.metadata, whole, None, where)
    adapter = to_adapter(file, shapes)
    targets = _targets(adapter, base, {})
    return Summary(path, "PEFT", size, targets, file.metadata, adapter.tensors, adapter, where)


def _targets(
    adapter: Adapter, base: Checkpoint | None, records: Mapping[str, Record]
) -> list[Target]:
    """Return a target for each delta; ``records`` tell how a compact file stores them."""
    targets = []
    recorded = adapter.metadata.get(FINGERPRINT_FIELD) or {}
    stored = {}
    if base is not None:
        stored = locate_deltas(without_tied(adapter.restrict(list(adapter)), base)[0], base, {})[0]
    for name, delta in adapter.items():
        values = lost = verdict = None
        if name in stored:
            if stored[name].dtype in FLOATS and not stored[name].fault:
                values = read_entries(stored[name], delta.support.indices.cpu())
                lost = vanishing(values, delta.values)
            verdict = judge(adapter.metadata, name, delta.values, values)
        record = records.get(name)
        targets.append(
            Target(
                name=name,
                shape=tuple(delta.support.shape),
                dtype="int8" if record and record.values == "I8" else dtype_text(delta.values),
                values=(delta.values,),
                fingerprint=recorded.get(name),
                vanishing=lost,
                base=verdict,
                indices=record.indices if record else None,
            )
        )
    return targets


def _text(value: float | None, form: str, unknown: str) -> str:
    return unknown if value is None else format(value, form)
