# SPDX-License-Identifier: Apache-2.0
"""What the four commands print for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shira.cli.console import console, megabytes, table

if TYPE_CHECKING:
    from shira.adapter import Adapter
    from shira.convert import Extraction, FromLora, Merged, Unmerged
    from shira.convert.rewriting import Written

_MANY = 24  # rows of a table before the rest is summed up


def merged(told: Merged) -> None:
    """What a merge did: the whole, and each tensor."""
    out = console()
    verdicts = [target.base for target in told.targets]
    lines = {
        "output": f"{told.output}, {megabytes(told.written.size)}",
        "undo file": "not written (--undo)" if told.undo is None else str(told.undo),
        "entries": f"{told.nnz:,} in {len(told.targets)} weights",
        "lost to rounding": share(told.lost, told.nonzero, "deltas other than zero"),
        "names": told.naming,
        "base": ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)) or "-",
        **_files(told.written),
    }
    out.print(summary("Merged", lines))
    rows = [
        (t.key, t.dtype, f"{t.nnz:,}", f"{t.lost:,}", _percent(t.lost, t.nonzero), t.base)
        for t in told.targets
    ]
    columns = ("weight", "dtype", "k", "lost", "lost %", "base")
    out.print(listing("Weights", columns, rows, right=("k", "lost", "lost %")))
    if told.whole:
        whole = [(w.key, w.dtype, _shape(w.shape), f"{w.changed:,}") for w in told.whole]
        of_whole = ("whole tensor", "dtype", "shape", "changed")
        out.print(listing("Whole tensors", of_whole, whole, right=("changed",)))


def unmerged(told: Unmerged) -> None:
    """What an undoing did."""
    lines = {
        "output": f"{told.output}, {megabytes(told.written.size)}",
        "put back": f"{told.entries:,} entries in {told.tensors} weights",
        **_files(told.written),
    }
    console().print(summary("Unmerged", lines))


def extracted(told: Extraction, saved: Mapping[str, Any], exact: bool) -> None:
    """What was found between two models; ``exact`` is for the adapter as it was saved."""
    out = console()
    differing = sum(change.differing for change in told.changes)
    missed = sum(change.missed for change in told.changes)
    lines = {
        "output": f"{saved['output']}, {saved['format']}, {megabytes(saved['bytes'])}",
        "entries": f"{told.adapter.nnz:,} in {len(told.adapter)} weights, density "
        f"{told.adapter.density:.2%}; {differing:,} differ",
        "exact": "yes: base and adapter give the tuned weights, bit for bit"
        if exact
        else "no"
        if not told.exact
        else "not in the dtype that it was saved in",
        "energy kept": f"{told.energy_share:.4%} of the squared difference",
    }
    if missed:
        lines["not reached"] = f"{missed:,} entries, which no float64 delta carries there exactly"
    for title, names in (
        ("left out", told.excluded),
        ("only in the base", told.only_in_base),
        ("only in the tuned", told.only_in_tuned),
        ("not compared", told.not_compared),
    ):
        if names:
            lines[title] = some(names)
    out.print(summary("Extracted", lines))
    rows = [
        (
            change.name,
            f"{change.differing:,}",
            f"{change.kept:,}",
            f"{change.energy_kept / change.energy:.2%}" if change.energy else "-",
        )
        for change in told.changes
    ]
    columns = ("weight", "differ", "kept", "energy")
    out.print(listing("Weights", columns, rows, right=("differ", "kept", "energy")))


def from_lora(told: FromLora, saved: Mapping[str, Any]) -> None:
    """What was kept of a LoRA."""
    out = console()
    lines = {
        "output": f"{saved['output']}, {saved['format']}, {megabytes(saved['bytes'])}",
        "entries": f"{told.adapter.nnz:,} in {len(told.adapter)} weights, density "
        f"{told.adapter.density:.2%}",
        "energy kept": f"{told.energy_share:.2%} of the squared update",
    }
    out.print(summary("From LoRA", lines | whole_tensors(told.adapter)))
    rows = [
        (
            kept.name,
            str(kept.rank),
            f"{kept.kept:,}",
            f"{kept.energy_kept / kept.energy:.2%}" if kept.energy else "-",
        )
        for kept in told.weights
    ]
    columns = ("weight", "rank", "kept", "energy")
    out.print(listing("Weights", columns, rows, right=("rank", "kept", "energy")))


def summary(title: str, lines: Mapping[str, str]) -> Any:
    """One line for each thing to know."""
    result = table(title, "what", "", show_header=False)
    for name, value in lines.items():
        result.add_row(name, value)
    return result


def listing(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: tuple[str, ...],
) -> Any:
    """A row for each weight; of many the first, and how many more there are."""
    result = table(title, *columns, right=right)
    for row in rows[:_MANY]:
        result.add_row(*row)
    if len(rows) > _MANY:
        result.add_row(f"... and {len(rows) - _MANY} more (--json lists all)")
    return result


def some(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def share(part: int, whole: int, what: str) -> str:
    """A part of a whole, as a count and in percent."""
    return f"{part:,} of {whole:,} {what} ({_percent(part, whole)})"


def whole_tensors(adapter: Adapter) -> dict[str, str]:
    """Return a line for each whole tensor of an adapter."""
    lines = {}
    for name, tensor in adapter.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines[f"whole {name}"] = f"{_shape(tensor.shape)}, {dtype}, {megabytes(tensor.nbytes)}"
    return lines


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _files(written: Written) -> dict[str, str]:
    lines = {"files": f"{len(written.patched)} patched, {len(written.copied)} copied"}
    if written.left_out:
        lines["left behind"] = some(written.left_out)
    return lines


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
