# SPDX-License-Identifier: Apache-2.0
"""Making adapters from adapters; knows of no model, file or PEFT.

::

    adapters    fuse, restrict, cast, fill_to_rank: what the operators of `Adapter` call
    methods     the pure functions that make methods, and the table of them
    result      what goes together, and what is true of the result
"""

from __future__ import annotations

from shira.fusing.adapters import cast, fill_to_rank, fuse, restrict
from shira.fusing.methods import METHODS, Method, keep_largest

__all__ = ["METHODS", "Method", "cast", "fill_to_rank", "fuse", "keep_largest", "restrict"]
