# SPDX-License-Identifier: Apache-2.0
"""Print for subcommands: coloured tables on a terminal, plain ASCII anywhere else.

Names, paths and metadata come from files that nobody vouches for. Every text goes through
`shira.errors.shown`, and reaches rich as a ``Text``, in which brackets are no markup.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from io import TextIOWrapper
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shira.errors import shown

_LONGEST = 20_000  # characters in a cell
_PLAIN_WIDTH = 200  # a table takes the width that it needs; this only bounds it


class _Plain(Console):
    """A console whose every text is printed as it is shown."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts and tables."""
        super().print(*(Text(shown(o)) if isinstance(o, str) else o for o in objects), **options)


class PlainTable(Table):
    """A table whose every text is shown as it is."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of texts."""
        super().add_row(*(Text(_cell(cell)) for cell in cells), **options)


def _cell(text: object) -> str:
    """Return a text as a table shows it; of one so long that rich takes minutes, the start."""
    text = shown(text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} ... ({len(text):,} characters; --json prints all)"


def console(stream: TextIO | None = None) -> Console:
    """A console on `stream` (standard output), without control codes unless it is a terminal."""
    stream = stream or sys.stdout
    if stream.isatty():
        return _Plain(file=stream, highlight=False, markup=False, emoji=False)
    return _Plain(
        file=stream,
        highlight=False,
        markup=False,
        force_terminal=False,
        no_color=True,
        color_system=None,
        width=_PLAIN_WIDTH,
        emoji=False,
    )


def table(
    title: str, *columns: str, right: tuple[str, ...] = (), note: str = "", **kwargs: Any
) -> Table:
    """Return an empty table.

    Args:
        title: Of the table.
        *columns: Names of the columns.
        right: Those that hold numbers and are aligned to the right.
        note: A second line of the title.
        **kwargs: More for rich's ``Table``.
    """
    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2
    heading = Text("\n".join(map(_cell, filter(None, (title, note)))), style="table.title")
    result = PlainTable(title=heading, title_justify="left", box=style, **kwargs)
    for name in columns:
        justify: Any = "right" if name in right else "left"
        result.add_column(Text(_cell(name)), justify=justify, overflow="fold")
    return result


def write(text: str, stream: TextIO | None = None) -> None:
    """Print one line, on standard output if no stream is given."""
    print(shown(text), file=stream or sys.stdout, flush=True)


def plain_messages() -> None:
    """Show what Python prints by itself as text too: warnings, log messages, tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **more: shown(format_warning(*args, **more), lines=True)
    logging.setLogRecordFactory(_PlainRecord)
    sys.excepthook = _print_traceback
    threading.excepthook = lambda e: _print_traceback(e.exc_type, e.exc_value, e.exc_traceback)


class _PlainRecord(logging.LogRecord):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = _told(*self.exc_info).rstrip("\n")

    def getMessage(self) -> str:
        return shown(super().getMessage(), lines=True)


def _print_traceback(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    print(_told(kind, error, trace), end="", file=sys.stderr)


def _told(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> str:
    return shown("".join(traceback.format_exception(kind, error, trace)), lines=True)


def megabytes(size: int) -> str:
    """A file size to read: ``"3.1 MB"`` (10^6 bytes), ``"12 kB"``, ``"80 B"``."""
    if size < 1000:
        return f"{size} B"
    if size < 1_000_000:
        return f"{size / 1000:.0f} kB"
    return f"{size / 1_000_000:.1f} MB"
