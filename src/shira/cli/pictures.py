# SPDX-License-Identifier: Apache-2.0
"""Writing a drawing of matplotlib's as a PNG."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from shira.errors import ConfigError, MissingDependencyError
from shira.store.atomic import write_atomically


def new_drawing(size: tuple[float, float], option: str, path: Path) -> Any:
    """Return an empty figure to draw on.

    Args:
        size: Width and height in inches.
        option: What the path was given as, for messages.
        path: Where it will be written.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        ConfigError: If the folder of ``path`` does not exist.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"{option} needs matplotlib: pip install matplotlib"
        ) from error
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
    return Figure(figsize=size, layout="constrained")


def write_drawing(drawing: Any, path: Path, **options: Any) -> None:
    """Write a figure as a PNG, in the place of whatever file is at ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(drawing)
    buffer = BytesIO()
    drawing.savefig(buffer, format="png", **options)
    write_atomically(path, buffer.getbuffer())
