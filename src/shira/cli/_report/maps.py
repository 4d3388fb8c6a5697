# SPDX-License-Identifier: Apache-2.0
"""Heat maps as the page holds them: a byte for each part of a weight, as text."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira.cli.pictures import heat_map
from shira.support import Support, matrix_shape

_BYTES = 2**21  # of all maps of a page together, before they become text
_LEAST, _MOST = 24, 384  # rows and columns of parts


@dataclass(frozen=True)
class Map:
    """Where the entries of one weight are.

    Attributes:
        name: Of the weight.
        shape: Of the weight seen as a matrix.
        down: Rows of parts; ``across`` columns of parts.
        top: The largest share of trained entries in a part.
        cells: ``down * across`` bytes: shares in 255ths of ``top``; 0 only where there is no entry.
    """

    name: str
    shape: tuple[int, int]
    down: int
    across: int
    top: float
    cells: bytes

    def as_json(self) -> dict[str, Any]:
        """For the script of the page."""
        return {
            "name": self.name,
            "rows": self.shape[0],
            "cols": self.shape[1],
            "down": self.down,
            "across": self.across,
            "top": self.top,
            "cells": base64.b64encode(self.cells).decode("ascii"),
        }


def side(maps: int) -> int:
    """Rows and columns of parts that each of so many maps may have, to keep the page small."""
    return min(max(math.isqrt(_BYTES // max(maps, 1)), _LEAST), _MOST)


def mask_map(name: str, support: Support, most: int) -> Map:
    """The map of one weight, of at most ``most`` x ``most`` parts of like size; O(k + parts)."""
    shape = matrix_shape(support.shape)
    made = heat_map(support, (_parts(shape[0], most), _parts(shape[1], most)))
    top = float(made.max()) if made.size else 0.0
    cells = np.ceil(made * (255 / top)) if top else made
    down, across = made.shape
    return Map(name, shape, down, across, top, cells.clip(0, 255).astype(np.uint8).tobytes())


def _parts(size: int, most: int) -> int:
    """So many parts that all hold the same number of rows, but perhaps for one row less."""
    return -(-size // -(-size // most)) if size else 0
