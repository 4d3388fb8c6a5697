# SPDX-License-Identifier: Apache-2.0
"""From two models to the adapter between them.

Without a budget the adapter is exact: every entry that differs, with the delta that carries the
base's value to the tuned one bit for bit (`exact_delta`). A model that was tuned in full differs
nearly everywhere; then a budget keeps the entries that changed most, and the report says how much
of the change they hold: its energy, the sum of squares.

Tensors pass by in pieces, the two models side by side. What is kept are the chosen positions, whose
values are looked up afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import accumulation_dtype, fingerprint_fields, replacement
from shira.checkpoints.entries import Progress
from shira.checkpoints.locating import match_names
from shira.checkpoints.models import Model, OnDisk, Source, source_of
from shira.delta import SparseDelta
from shira.errors import AdapterError, WrongBaseError, did_you_mean
from shira.masks.budget import Budget
from shira.support import Support

SPARSE = 0.5
"""The largest share of entries that may differ where no budget is given."""


@dataclass(frozen=True)
class Change:
    """The change of one tensor.

    Attributes:
        name: The parameter.
        shape: Its shape.
        differing: Entries that differ between the two models.
        kept: Those that the adapter holds.
        energy: Sum of squared differences.
        energy_kept: That of the entries kept.
        missed: Kept entries that no delta carries to exactly the tuned value.
    """

    name: str
    shape: tuple[int, ...]
    differing: int
    kept: int
    energy: float
    energy_kept: float
    missed: int


@dataclass(frozen=True)
class Extraction:
    """An adapter and what it leaves out.

    Attributes:
        adapter: The adapter.
        changes: Tensor by tensor, those without a difference left out.
        unchanged: The number of tensors that are the same in both models.
        excluded: Tensors that the caller left out.
        only_in_base: Tensors that the tuned model lacks.
        only_in_tuned: Tensors that the base lacks, such as a new head.
        not_compared: Tensors without floating-point numbers, such as counting buffers and
            quantized weights.
    """

    adapter: Adapter
    changes: tuple[Change, ...]
    unchanged: int
    excluded: tuple[str, ...]
    only_in_base: tuple[str, ...]
    only_in_tuned: tuple[str, ...]
    not_compared: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """True if base and adapter give the tuned model, in the tensors looked at, bit for bit."""
        return all(c.kept == c.differing and not c.missed for c in self.changes)

    @property
    def energy_share(self) -> float:
        """Share of the squared difference that the adapter holds, from 0 to 1."""
        whole = math.fsum(change.energy for change in self.changes)
        return math.fsum(c.energy_kept for c in self.changes) / whole if whole else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return everything but the adapter's values as JSON can hold it."""
        return {
            "exact": self.exact,
            "nnz": self.adapter.nnz,
            "density": self.adapter.density,
            "energy_share": self.energy_share,
            "differing": sum(change.differing for change in self.changes),
            "missed": sum(change.missed for change in self.changes),
            "unchanged": self.unchanged,
            **{
                kind: list(getattr(self, kind))
                for kind in ("excluded", "only_in_base", "only_in_tuned", "not_compared")
            },
            "changes": [asdict(change) for change in self.changes],
        }


def extract(
    base: Model,
    tuned: Model,
    *,
    density: float | None = None,
    r: int | None = None,
    everywhere: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> Extraction:
    """Make the adapter that leads from one model to another.

    Args:
        base: A safetensors checkpoint's path, a module, or a state dict.
        tuned: The same for the tuned model.
        density: Keep at most this share of each tensor's entries.
        r: Keep at most ``r * (m + n)`` entries of an m x n tensor.
        everywhere: Spend the sum of these budgets on the largest differences of all tensors.
        include: Patterns (as of file names) of the parameters to look at.
        exclude: Patterns of those to leave out of them.
        progress: Told the entries done and those there are in all.

    Returns:
        The adapter, in float32 (float64 in a tensor where float32 cannot carry every entry), with
        the base's fingerprint in its metadata, and what it leaves out.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        FileFormatError: If a checkpoint is damaged.
        AdapterError: If no budget is given and more than half of the entries differ, a value
            is not finite, or no parameter is left to look at.
        WrongBaseError: If the models share no parameter, or one has another shape in the other.
        ConfigError: If the budget is not possible.

    Example:
        >>> base, tuned = {"w": torch.zeros(2, 3)}, {"w": torch.tensor([[0.0, 1, 0], [0, 0, 2]])}
        >>> found = shira.convert.extract(base, tuned)
        >>> found.exact, found.adapter["w"].support.indices.tolist()
        (True, [1, 5])
    """
    budget = Budget(density, r, everywhere)
    old, new = _opened(base, tuned)
    names, shared = _chosen(old, new, include, exclude)
    reader = _Reader(old, new, names, progress)
    if not budget.given:
        supports = _all_that_differ(reader)
    else:
        shapes = {name: old.shapes[name] for name in names}
        found = budget.largest({name: reader.scores(name) for name in names}, shapes)
        supports = {name: Support._trusted(shapes[name], flat) for name, flat in found.items()}
    deltas, changes, bases = {}, [], {}
    for name, support in supports.items():
        if not reader.differing[name]:
            continue
        before = old.entries(name, support.indices)
        after = new.entries(names[name], support.indices).to(before.dtype)
        differs = before != after  # a budget may reach beyond what differs
        before, after = before[differs], after[differs]
        values, missed = exact_delta(before, after)
        if values.numel():
            kept = Support._trusted(support.shape, support.indices[differs])
            deltas[name] = SparseDelta(kept, values)
            bases[name] = before
        differing, k, energy = reader.differing[name], values.numel(), reader.energy[name]
        kept_energy = energy
        if k < differing:
            wide = accumulation_dtype(before.dtype)
            kept_energy = float((after.to(wide) - before.to(wide)).double().square().sum())
        changes.append(Change(name, support.shape, differing, k, energy, kept_energy, missed))
    theirs = set(shared.values())
    metadata = fingerprint_fields(bases)
    if isinstance(old, OnDisk):
        recorded = old.checkpoint.config.get("_name_or_path")
        metadata["base_model_name_or_path"] = recorded or old.label
    return Extraction(
        adapter=Adapter(deltas, metadata),
        changes=tuple(changes),
        unchanged=len(names) - len(changes),
        excluded=tuple(name for name in shared if name not in names),
        only_in_base=tuple(name for name in old.shapes if name not in shared),
        only_in_tuned=tuple(name for name in new.shapes if name not in theirs),
        not_compared=tuple(dict.fromkeys((*old.others, *new.others))),
    )


def exact_delta(base: Tensor, tuned: Tensor) -> tuple[Tensor, int]:
    """Return deltas with ``replacement(base, delta) == tuned``, and how many entries have none.

    ``round(base + delta)`` is the tuned value, bit for bit, when ``delta`` lies in a certain
    interval, for adding and rounding keep order; and the interval holds ``tuned - base`` as a real
    number. So if any float32 delta will do, one of the two float32 neighbours of ``tuned - base``
    does, and as a rule it is the nearest. If the tuned value came from a float32 adapter there is
    one, since that adapter's own delta is one. Where there is none (a large weight that became a
    very small one) float64 is tried in the same way, and what even that cannot reach is counted.
    Zeros count as equal whatever their sign: no sum of a nonzero base and a delta is -0.0.
    """
    dtype = accumulation_dtype(base.dtype)
    while True:
        delta = tuned.to(dtype) - base.to(dtype)
        missed = (replacement(base, delta) != tuned).nonzero().squeeze(1)
        for direction in (math.inf, -math.inf):
            near = torch.nextafter(delta[missed], torch.tensor(direction, dtype=dtype))
            hits = replacement(base[missed], near) == tuned[missed]
            delta[missed[hits]] = near[hits]
            missed = missed[~hits]
        if dtype == torch.float64 or not missed.numel():
            return delta, missed.numel()
        dtype = torch.float64


class _Reader:
    """Two models side by side, and what was seen of each tensor in passing."""

    def __init__(
        self, old: Source, new: Source, names: Mapping[str, str], progress: Progress | None
    ) -> None:
        self.old, self.new, self.names = old, new, names
        self.differing = dict.fromkeys(names, 0)
        self.energy = dict.fromkeys(names, 0.0)
        self.total = sum(math.prod(old.shapes[name]) for name in names)
        self._done, self._progress = 0, progress

    def differences(self, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the size of each piece, and where in it the two differ and by how much."""
        dtype = self.old.dtype(name)
        wide = accumulation_dtype(dtype)
        for a, b in zip(self.old.blocks(name), self.new.blocks(self.names[name]), strict=True):
            numel = a.numel()
            b = b.to(dtype)  # what the base's dtype can hold is what a merge can reach
            here = (a != b).nonzero().squeeze(1)
            if here.numel() < numel:
                a, b = a[here], b[here]
            size = (b.to(wide) - a.to(wide)).abs_()
            if size.numel() and not math.isfinite(float(size.max())):
                raise AdapterError(
                    f"{name!r}: values or differences that are not finite: there is NaN or "
                    f"infinity in {self.old.label} or {self.new.label}"
                )
            self.differing[name] += here.numel()
            self.energy[name] += float(size.double().square().sum())
            self._done += numel
            if self._progress is not None:
                self._progress(self._done, self.total)
            yield numel, here, size

    def scores(self, name: str) -> Iterator[Tensor]:
        """Give the absolute differences of all entries of a tensor, piece by piece."""
        for numel, here, size in self.differences(name):
            everywhere = here.numel() == numel
            yield size if everywhere else size.new_zeros(numel).index_put_((here,), size)


def _opened(base: Model, tuned: Model) -> tuple[Source, Source]:
    """Open both; a checkpoint without a config has the names of the other's model."""
    old, new = source_of(base), source_of(tuned)
    if isinstance(old, OnDisk) and isinstance(new, OnDisk):
        old_config, new_config = old.checkpoint.config, new.checkpoint.config
        if not old_config:
            old = OnDisk(replace(old.checkpoint, config=new_config))
        elif not new_config:
            new = OnDisk(replace(new.checkpoint, config=old_config))
    return old, new


def _chosen(
    old: Source, new: Source, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the tuned model calls the parameters to look at, and all that both have."""
    shared = {name: name for name in old.shapes if name in new.shapes}
    if not shared:
        prefix = match_names(list(old.shapes), list(new.shapes)) if old.shapes else None
        if prefix is None:
            some, other = next(iter(old.shapes), "none"), next(iter(new.shapes), "none")
            raise WrongBaseError(
                f"{old.label} and {new.label} share no parameter: the one has {some!r}, the other "
                f"{other!r}"
            )
        shared = {name: prefix.apply(name) or name for name in old.shapes}
    names = {
        name: theirs
        for name, theirs in shared.items()
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not names:
        raise AdapterError(
            f"no parameter of {old.label} is left: include {list(include)}, exclude "
            f"{list(exclude)}.{did_you_mean(next(iter(include), ''), shared)}"
        )
    for name, theirs in names.items():
        if old.shapes[name] != new.shapes[theirs]:
            raise WrongBaseError(
                f"{name!r} has shape {old.shapes[name]} in {old.label}, but "
                f"{new.shapes[theirs]} in {new.label}; leave it out with exclude, or is this "
                "another base?"
            )
    return names, shared


def _all_that_differ(reader: _Reader) -> dict[str, Support]:
    """Return every entry that differs, if they are few enough for an adapter."""
    supports, found = {}, 0
    for name in reader.names:
        pieces, start = [], 0
        for numel, here, _ in reader.differences(name):
            found += here.numel()
            if found > SPARSE * reader.total:
                old, new = reader.old.dtype(name), reader.new.dtype(reader.names[name])
                other = f", or has other dtypes ({new} where the base has {old})"
                raise AdapterError(
                    f"{reader.new.label} differs from {reader.old.label} in more than "
                    f"{SPARSE:.0%} of the {reader.total:,} entries: it was tuned in full"
                    f"{other if old != new else ''}. Give a budget, density= or r= "
                    "(--density, --r), to keep the entries that changed most"
                )
            pieces.append(here + start)
            start += numel
        flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
        supports[name] = Support._trusted(reader.old.shapes[name], flat)
    return supports
