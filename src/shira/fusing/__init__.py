# SPDX-License-Identifier: Apache-2.0
"""Making adapters from adapters: `fuse`, and what the operators of `Adapter` call.

`METHODS` is the table of ways to fuse; ``sparsify`` and ``combine`` are what its rows are made of,
``reference`` says the same on dense tensors. ``draws`` is where
chance comes from, ``checks`` refuses what does not belong together, ``whole`` carries whole
tensors, ``metadata`` says what is still true of the result, ``filling`` makes it one that stock
PEFT loads. Sits above ``delta`` and ``masks``; knows of no model, file or PEFT.
"""

from __future__ import annotations

from shira.fusing.adapters import fuse
from shira.fusing.filling import fill_to_rank
from shira.fusing.methods import METHODS, Method
from shira.fusing.pruning import keep_largest
from shira.fusing.restrict import cast, restrict

__all__ = ["METHODS", "Method", "cast", "fill_to_rank", "fuse", "keep_largest", "restrict"]
