# SPDX-License-Identifier: Apache-2.0
"""What subcommands print with: coloured tables for a terminal, plain ASCII for anything else."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 200  # a table takes the width that it needs; this only bounds it


def console(stream: TextIO | None = None) -> Console:
    """A console on `stream` (standard output), without control codes unless it is a terminal."""
    stream = stream or sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(
        file=stream,
        highlight=False,
        force_terminal=False,
        no_color=True,
        color_system=None,
        width=_PLAIN_WIDTH,
        emoji=False,
    )


def table(title: str, *columns: str, right: tuple[str, ...] = (), **kwargs: Any) -> Table:
    """An empty table; the columns named in `right` hold numbers and are aligned to the right."""
    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2
    result = Table(title=title, title_justify="left", box=style, **kwargs)
    for name in columns:
        result.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return result


def megabytes(size: int) -> str:
    """A file size to read: ``"3.1 MB"`` (10^6 bytes), ``"12 kB"``, ``"80 B"``."""
    if size < 1000:
        return f"{size} B"
    if size < 1_000_000:
        return f"{size / 1000:.0f} kB"
    return f"{size / 1_000_000:.1f} MB"
