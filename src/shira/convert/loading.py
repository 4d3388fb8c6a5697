# SPDX-License-Identifier: Apache-2.0
"""Reading an adapter for a checkpoint at hand.

Stock PEFT's files do not record the shapes of the weights; here they come from the checkpoint, with
the same change of prefix that merging uses.
"""

from __future__ import annotations

import os
from pathlib import Path

from shira.checkpoints.naming import locate
from shira.checkpoints.opening import Checkpoint
from shira.delta import Adapter
from shira.store import FORMATS, read_peft, to_adapter


def load_for(path: str | os.PathLike[str], checkpoint: Checkpoint | None = None) -> Adapter:
    """Read an adapter of any format.

    Args:
        path: The adapter.
        checkpoint: Where shapes are known from if the file does not tell them.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If it is damaged, or its shapes are not known.
        WrongBaseError: If the checkpoint lacks a parameter.
    """
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(2, "no such file or folder", str(where))
    kind = next(name for name, known in FORMATS.items() if known.claims(where))
    if kind != "peft" or checkpoint is None:
        return Adapter.load(where)
    file = read_peft(where)
    if file.shapes is not None:
        return to_adapter(file)
    located, _ = locate([raw.weight_name for raw in file.tensors.values()], checkpoint)
    return to_adapter(file, {name: stored.shape for name, stored in located.items()})
