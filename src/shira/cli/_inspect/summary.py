# SPDX-License-Identifier: Apache-2.0
"""What an adapter holds, as plain values that `tables` prints and ``--json`` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD, Verdict, judge
from shira.checkpoints import Checkpoint, shapes_of
from shira.checkpoints.entries import values_at
from shira.checkpoints.naming import locate_deltas
from shira.cli._inspect.figures import Figures, vanishing
from shira.errors import ConfigError
from shira.store import PeftFile, is_compact, read_compact, read_peft, to_adapter

MASK_FIELDS = ("mask_type", "random_seed", "mask_slot", "mask_options", "r", "density")
BASE_FIELD = "base_model_name_or_path"


@dataclass(frozen=True)
class Target:
    """One adapted weight.

    Attributes:
        name: the base model's own parameter name.
        shape: of the weight; None where the file does not say and no base was given.
        nnz: how many of its entries the adapter changes (k).
        dtype: of the values, as ``"float32"``.
        figures: of the values.
        fingerprint: what the file says of the base values at the entries.
        vanishing: deltas that a bfloat16 base swallows; None without the base.
        base: whether the base given is the one that the adapter was made on; None without one.
        indices: how a compact file stores them: ``"gaps"``, ``"blocks"``, ``"seed"``.
    """

    name: str
    shape: tuple[int, ...] | None
    nnz: int
    dtype: str
    figures: Figures
    fingerprint: str | None
    vanishing: int | None
    base: Verdict | None
    indices: str | None = None

    @property
    def numel(self) -> int | None:
        """Entries of the weight."""
        return None if self.shape is None else prod(self.shape)

    @property
    def density(self) -> float | None:
        """nnz / numel."""
        return self.nnz / self.numel if self.numel else None


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
    def vanishing(self) -> int | None:
        """Deltas in all that a bfloat16 base swallows; None without the base."""
        return _sum_or_none(target.vanishing for target in self.targets)

    @property
    def figures(self) -> Figures:
        """Of all values together."""
        return sum((target.figures for target in self.targets), Figures())

    @property
    def unlike_base(self) -> list[str] | None:
        """Targets whose base values are not those of the base given; None if none can be told."""
        if not {target.base for target in self.targets} & {
            "same",
            "same after rounding",
            "another",
        }:
            return None
        return [target.name for target in self.targets if target.base == "another"]

    def as_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold; unknown figures are null."""
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
            "values": self.figures.summary(),
            "vanishing_in_bfloat16": self.vanishing,
            "base": {
                "recorded": self.metadata.get(BASE_FIELD),
                "compared_with": self.base,
                "targets_unlike": self.unlike_base,
            },
            "targets": [
                {
                    "name": target.name,
                    "shape": target.shape,
                    "nnz": target.nnz,
                    "density": target.density,
                    "dtype": target.dtype,
                    "indices": target.indices,
                    "values": target.figures.summary(),
                    "vanishing_in_bfloat16": target.vanishing,
                    "base_fingerprint": target.fingerprint,
                    "base": target.base,
                }
                for target in self.targets
            ],
            "whole_tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": _dtype(tensor),
                    "bytes": tensor.nbytes,
                }
                for name, tensor in self.whole.items()
            },
            "config": {
                name: value
                for name, value in self.metadata.items()
                if name not in (FINGERPRINT_FIELD, ROUNDED_FIELD)
            },
        }


def summarize(path: Path, base: Checkpoint | None = None) -> Summary:
    """Read an adapter and describe it.

    Args:
        path: a folder or file in any format that shira reads.
        base: the base model's checkpoint, for what cannot be known without it.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If it is damaged or no adapter.
        WrongBaseError: If ``base`` lacks a weight that the adapter changes.
    """
    if not path.exists():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    if is_compact(path):
        return _of_compact(path, base)
    file = read_peft(path)
    names = [raw.weight_name for raw in file.tensors.values()]
    shapes = file.shapes if base is None else shapes_of(base, names)
    if shapes is None:
        targets, whole = tuple(_without_shapes(file)), {**file.whole, **file.copies}
    else:
        adapter = to_adapter(file, shapes)
        targets, whole = tuple(_targets(adapter, file.config, base)), adapter.tensors
    metadata = {name: value for name, value in file.config.items() if name != "shira_shapes"}
    size = _size(file.path)
    return Summary(path, "PEFT", size, targets, metadata, _name(base), whole)


def known_shapes(summary: Summary, what: str) -> dict[str, tuple[int, ...]]:
    """The shape of each target.

    Args:
        summary: Of the adapter.
        what: What needs them, for the message: ``"--plot"``.

    Raises:
        ConfigError: If one is not known.
    """
    shapes = {target.name: target.shape for target in summary.targets}
    unknown = [name for name, shape in shapes.items() if shape is None]
    if unknown:
        raise ConfigError(
            f"{what} needs the shape of {unknown[0]!r}, which the file does not record; give the "
            "base model with --base"
        )
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _of_compact(path: Path, base: Checkpoint | None) -> Summary:
    file = read_compact(path)
    metadata = file.adapter.metadata
    targets = tuple(
        replace(
            target,
            dtype="int8" if file.records[target.name].values == "I8" else target.dtype,
            indices=file.records[target.name].indices,
        )
        for target in _targets(file.adapter, metadata, base)
    )
    size = _size(file.path)
    whole = file.adapter.tensors
    return Summary(path, "compact", size, targets, metadata, _name(base), whole, file.library)


def _targets(
    adapter: Adapter, metadata: Mapping[str, Any], base: Checkpoint | None
) -> Iterator[Target]:
    recorded = metadata.get(FINGERPRINT_FIELD) or {}
    stored = {} if base is None else locate_deltas(adapter, base)[0]
    for name, delta in adapter.items():
        swallowed = verdict = None
        if name in stored:
            held = values_at(stored[name], delta.support.indices)
            swallowed = None if held is None else vanishing(held, delta.values)
            verdict = judge(metadata, name, delta.values, held)
        yield Target(
            name=name,
            shape=tuple(delta.support.shape),
            nnz=delta.nnz,
            dtype=_dtype(delta.values),
            figures=Figures.of(delta.values),
            fingerprint=recorded.get(name),
            vanishing=swallowed,
            base=verdict,
        )


def _without_shapes(file: PeftFile) -> Iterator[Target]:
    """Targets of a file that does not record shapes, as stock PEFT's never do."""
    for raw in file.tensors.values():
        yield Target(
            name=raw.weight_name,
            shape=None,
            nnz=raw.nnz,
            dtype=_dtype(raw.values),
            figures=Figures.of(raw.values),
            fingerprint=None,
            vanishing=None,
            base=None,
        )


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _name(base: Checkpoint | None) -> str | None:
    return None if base is None else str(base.path)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _sum_or_none(counts: Iterator[int | None]) -> int | None:
    known = list(counts)
    if not known or None in known:
        return None
    return sum(count for count in known if count is not None)
