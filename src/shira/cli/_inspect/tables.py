# SPDX-License-Identifier: Apache-2.0
"""An adapter's summary as two tables: the whole, and its targets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.table import Table

from shira.cli._inspect.figures import Figures
from shira.cli._inspect.summary import BASE_FIELD, MASK_FIELDS, Summary, Target
from shira.cli.output import megabytes, table

_NEEDS_BASE = "needs --base"
_FEW = 12  # targets that are listed one by one even when grouping is asked for
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def whole(summary: Summary) -> Table:
    """One line for each thing to know of the adapter."""
    result = table(str(summary.path), "what", "", show_header=False)
    for name, value in lines(summary):
        result.add_row(name, value)
    return result


def targets(summary: Summary, *, each: bool, width: int) -> Table:
    """The adapted weights; like ones of different layers share a row unless `each`.

    A terminal of fewer than some `width` columns gets fewer figures rather than broken words.
    """
    rows = summary.targets
    grouped = not each and len(rows) > _FEW
    columns = _COLUMNS if width >= _WIDE else [row for row in _COLUMNS if row[0] not in _LEFT_OUT]
    result = table(
        "Targets" + (" (* is a layer's number; --all lists each weight)" if grouped else ""),
        *(name for name, _, _ in columns),
        right=tuple(name for name, is_number, _ in columns if is_number),
    )
    for target, count in _grouped(rows) if grouped else [(target, 1) for target in rows]:
        result.add_row(*(show(target, count) for _, _, show in columns))
    return result


def _value(name: str) -> Callable[[Target, int], str]:
    """A column of a figure of the values."""
    return lambda target, count: _number(target.figures.summary()[name])


# Name, whether it is a number, and how it is shown for a row that stands for `count` weights.
_COLUMNS: list[tuple[str, bool, Callable[[Target, int], str]]] = [
    ("weight", False, lambda target, count: target.name),
    ("weights", True, lambda target, count: str(count)),
    ("shape", False, lambda target, count: " x ".join(map(str, target.shape or "?"))),
    ("k", True, lambda target, count: f"{target.nnz:,}"),
    ("density", True, lambda target, count: _percent(target.density and target.density / count)),
    ("dtype", False, lambda target, count: target.dtype),
    ("min", True, _value("min")),
    ("max", True, _value("max")),
    ("mean abs", True, _value("mean_abs")),
    ("std", True, _value("std")),
    ("zeros", True, lambda target, count: f"{target.figures.zeros:,}"),
    ("lost in bf16", True, lambda target, count: _count(target.vanishing)),
]
_WIDE = 150
_LEFT_OUT = ("dtype", "min", "max", "std", "zeros")


def lines(summary: Summary) -> list[tuple[str, str]]:
    """What there is to know of the adapter, and what it is; no name: more of the line before."""
    figures = summary.figures.summary()
    given = {name: summary.metadata.get(name) for name in MASK_FIELDS}
    if given["density"] is not None:
        given["r"] = None  # density takes its place
    lost = summary.vanishing
    fingerprints = sum(target.fingerprint is not None for target in summary.targets)
    sparse_bytes = summary.file_bytes - sum(tensor.nbytes for tensor in summary.whole.values())
    bytes_each = f", {sparse_bytes / summary.nnz:.2f} bytes an entry" if summary.nnz else ""
    found = [
        ("format", f"{summary.format}, {megabytes(summary.file_bytes)}{bytes_each}"),
        (
            "entries",
            f"{summary.nnz:,} in {len(summary.targets)} weights, density "
            f"{_percent(summary.density, _NEEDS_BASE)}",
        ),
        ("values", ", ".join(sorted({target.dtype for target in summary.targets}))),
        (
            "",
            f"min {_number(figures['min'])}, max {_number(figures['max'])}, mean absolute "
            f"{_number(figures['mean_abs'])}, std {_number(figures['std'])}, "
            f"{figures['zeros']:,} zeros",
        ),
        (
            "lost in bfloat16",
            _NEEDS_BASE
            if lost is None
            else f"{lost:,} of {summary.nnz - summary.figures.zeros:,} deltas other than zero "
            f"({lost / max(summary.nnz - summary.figures.zeros, 1):.1%})",
        ),
        (
            "mask",
            ", ".join(f"{k} {v}" for k, v in given.items() if v is not None) or "not recorded",
        ),
        ("base", str(summary.metadata.get(BASE_FIELD) or "not recorded")),
        ("base fingerprint", f"of {fingerprints} weights" if fingerprints else "not recorded"),
    ]
    if summary.library is not None:
        codings = Counter(target.indices for target in summary.targets)
        ways = ", ".join(f"{way} ({count} weights)" for way, count in codings.items())
        found[1:1] = [("written by", summary.library), ("indices as", ways)]
    if summary.base is not None:
        found.append(("", f"{summary.base} {_about_base(summary)}"))
    for at, (name, tensor) in enumerate(summary.whole.items()):
        shape = " x ".join(map(str, tensor.shape)) or "one number"
        dtype = str(tensor.dtype).removeprefix("torch.")
        told = f"{name}: {shape}, {dtype}, {megabytes(tensor.nbytes)}"
        found.append(("" if at else "whole tensors", told))
    return found


def _about_base(summary: Summary) -> str:
    """Describe the verdict on the base that was given."""
    unlike = summary.unlike_base
    if unlike:
        return f"is ANOTHER base: {len(unlike)} weights differ, such as {unlike[0]}"
    verdicts = Counter(target.base for target in summary.targets)
    if set(verdicts) <= {"same", "same after rounding"}:
        rounded = verdicts["same after rounding"]
        return f"is the same base{' after rounding' if rounded else ''}"
    return "as the base: " + ", ".join(f"{count} {told}" for told, count in verdicts.items())


def without_number(name: str) -> str:
    """A parameter's name with ``*`` for the number of its layer."""
    return _NUMBER.sub("*", name)


def _grouped(rows: Sequence[Target]) -> list[tuple[Target, int]]:
    """Targets of one name but for the layer, one shape and one dtype, as one with a count."""
    groups: dict[tuple[str, tuple[int, ...] | None, str], list[Target]] = {}
    for target in rows:
        name = without_number(target.name)
        groups.setdefault((name, target.shape, target.dtype), []).append(target)
    return [(_together(name, members), len(members)) for (name, _, _), members in groups.items()]


def _together(name: str, members: Sequence[Target]) -> Target:
    """Like weights as one; k and the other counts are those of all of them."""
    lost = [target.vanishing for target in members]
    return replace(
        members[0],
        name=name,
        nnz=sum(target.nnz for target in members),
        figures=sum((target.figures for target in members), Figures()),
        vanishing=None if None in lost else sum(count for count in lost if count is not None),
    )


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _percent(share: float | None, unknown: str = "?") -> str:
    return unknown if share is None else f"{share:.2%}"
