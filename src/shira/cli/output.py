# SPDX-License-Identifier: Apache-2.0
"""Print for subcommands: coloured tables on a terminal, plain ASCII anywhere else.

And set up the libraries underneath: no network, no bars and notes between a command's own lines.

Names, paths and metadata come from files that nobody vouches for. Every text goes through
`shira.errors.shown`, and reaches rich as a ``Text``, in which brackets are no markup.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shira.errors import MissingDependencyError, shown

if TYPE_CHECKING:
    from torch import Tensor

MANY = 24
"""Rows that a table of weights has unless all are asked for."""

_LONGEST = 20_000  # characters in a cell
_PLAIN_WIDTH = 200  # at most; a table takes what it needs


class _Plain(Console):
    """A console whose every text is printed as it is shown."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(Text(shown(o)) if isinstance(o, str) else o for o in objects), **options)


def _cell(text: object) -> str:
    """Return a text as a table shows it; of one so long that rich takes minutes, the start."""
    text = shown(text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} ... ({len(text):,} characters; --json prints all)"


def console(stream: TextIO | None = None) -> Console:
    """Return a console on `stream` (standard output); only a terminal gets control codes."""
    stream = stream or sys.stdout
    plain = {"force_terminal": False, "color_system": None, "width": _PLAIN_WIDTH}
    more: Any = {} if stream.isatty() else plain
    return _Plain(file=stream, highlight=False, markup=False, emoji=False, **more)


def write(text: str, stream: TextIO | None = None) -> None:
    """Print one line, on standard output if no stream is given."""
    print(shown(text), file=stream or sys.stdout, flush=True)


def print_json(value: object) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Sequence[str] = (),
    note: str = "",
    **options: Any,
) -> None:
    """Print a table; ``note`` is a second title, ``right`` are the columns of numbers."""
    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2
    heading = Text("\n".join(map(_cell, filter(None, (title, note)))), style="table.title")
    result = Table(title=heading, title_justify="left", box=style, **options)
    for name in columns:
        justify: Any = "right" if name in right else "left"
        result.add_column(Text(_cell(name)), justify=justify, overflow="fold")
    for row in rows:
        result.add_row(*(Text(_cell(cell)) for cell in row))
    console().print(result)


def facts(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """Print a name and a text for each thing to know."""
    print_table(title, ("what", ""), lines, show_header=False)


def listing(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str]
) -> None:
    """Print a row for each weight; of many the first, and how many more there are."""
    more = [[f"... and {len(rows) - MANY} more (--json lists all)"]] if len(rows) > MANY else []
    print_table(title, columns, [*rows[:MANY], *more], right)


def percent(part: float, whole: float, digits: int = 1) -> str:
    """Return a share in percent, ``"-"`` of nothing."""
    return f"{part / whole:.{digits}%}" if whole else "-"


def of_deltas(part: int, whole: int) -> str:
    """Return a part of the deltas other than zero, as a count and in percent."""
    return f"{part:,} of {whole:,} deltas other than zero ({percent(part, whole)})"


def shape_text(shape: Sequence[int] | None) -> str:
    """Return a shape to read: ``"4096 x 11008"``."""
    return "?" if shape is None else " x ".join(map(str, shape)) or "one number"


def dtype_text(tensor: Tensor) -> str:
    """Return a tensor's dtype to read: ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return shape, dtype and size of each whole tensor."""
    return {
        name: f"{shape_text(t.shape)}, {dtype_text(t)}, {megabytes(t.nbytes)}"
        for name, t in tensors.items()
    }


def megabytes(size: int) -> str:
    """Return a file size to read: ``"3.1 MB"`` (10^6 bytes), ``"12 kB"``, ``"80 B"``."""
    if size < 1000:
        return f"{size} B"
    if size < 1_000_000:
        return f"{size / 1000:.0f} kB"
    return f"{size / 1_000_000:.1f} MB"


def file_bytes(path: Path) -> int:
    """Return the size of a file, or of the files in a folder."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def plain_messages() -> None:
    """Show what Python prints by itself as text too: warnings, log messages, tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **more: shown(format_warning(*args, **more), lines=True)
    logging.setLogRecordFactory(_PlainRecord)
    sys.excepthook = lambda *raised: print(_told(*raised), end="", file=sys.stderr)
    threading.excepthook = lambda e: print(_told(*e[:3]), end="", file=sys.stderr)


class _PlainRecord(logging.LogRecord):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = _told(*self.exc_info).rstrip("\n")

    def getMessage(self) -> str:
        return shown(super().getMessage(), lines=True)


def _told(*raised: Any) -> str:
    return shown("".join(traceback.format_exception(*raised)), lines=True)


# ------------------------------------------------------------------------- libraries underneath


def no_accelerator_note() -> None:
    """Keep DeepSpeed from saying, on standard output, that it found no accelerator.

    transformers imports DeepSpeed wherever it is installed, whether it is used or not. Call it
    before transformers is imported; DeepSpeed's other messages come through.
    """
    note = "Setting accelerator to CPU"
    logging.getLogger("DeepSpeed").addFilter(lambda record: note not in record.getMessage())


@contextmanager
def needed_for(what: str, install: str) -> Iterator[None]:
    """Say what to install where something needs a package whose import fails."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{what} needs {error.name}: pip install {install}") from error


def offline() -> None:
    """Let Hugging Face libraries ask no server; call it before they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"


def share_cores() -> None:
    """Let waiting threads sleep instead of spinning; call it before torch is imported.

    It costs nothing on an idle machine. Where other programs want the same cores, a training step
    that would otherwise stall many times over is slowed down by their share alone.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quieten(*, warnings_too: bool) -> None:
    """Turn off other libraries' progress bars where no person looks, and perhaps their notes."""
    import huggingface_hub.utils
    from transformers.utils import logging as notes

    if warnings_too or not sys.stderr.isatty():
        notes.disable_progress_bar()  # type: ignore[no-untyped-call]
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if warnings_too:
        notes.set_verbosity_error()  # type: ignore[no-untyped-call]
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
