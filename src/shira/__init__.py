# SPDX-License-Identifier: Apache-2.0
"""shira: Sparse High Rank Adapters (SHiRA, arXiv 2406.13175) for PyTorch, transformers and PEFT.

An adapter is a set of positions in a model's own weights and a value at each. Everything costs
what those k entries cost, and the base model comes back bit for bit.

Names load on first use: the core needs torch alone; PEFT and transformers are imported only when
a name of the tuner is asked for.

The tree, each part importing only from its left::

    errors -> support, blocks, gaps -> base -> delta -> adapter -> ops -> masks -> store
        -> checkpoints, fusing, measure, convert, chain, switch -> tuner, serve -> cli
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shira._version import __version__

if TYPE_CHECKING:
    from shira import chain, convert, masks, ops, store
    from shira.adapter import Adapter
    from shira.delta import SparseDelta
    from shira.errors import ShiraError
    from shira.fusing import fuse
    from shira.measure import overlap
    from shira.support import Support
    from shira.switch import Switch
    from shira.tuner import (
        FactoredAdamW,
        PeftModel,
        ShiraConfig,
        ShiraLayer,
        ShiraModel,
        calibrate,
        get_peft_model,
    )

_WHERE = {
    "Adapter": "shira.adapter",
    "FactoredAdamW": "shira.tuner",
    "PeftModel": "shira.tuner",
    "ShiraConfig": "shira.tuner",
    "ShiraError": "shira.errors",
    "ShiraLayer": "shira.tuner",
    "ShiraModel": "shira.tuner",
    "SparseDelta": "shira.delta",
    "Support": "shira.support",
    "Switch": "shira.switch",
    "calibrate": "shira.tuner",
    "fuse": "shira.fusing",
    "get_peft_model": "shira.tuner",
    "overlap": "shira.measure",
}
_MODULES = (
    *("chain", "cli", "convert", "errors", "fusing", "masks", "measure"),
    *("ops", "serve", "store", "switch", "tuner"),
)

__all__ = [
    "Adapter",
    "FactoredAdamW",
    "PeftModel",
    "ShiraConfig",
    "ShiraError",
    "ShiraLayer",
    "ShiraModel",
    "SparseDelta",
    "Support",
    "Switch",
    "__version__",
    "calibrate",
    "chain",
    "convert",
    "fuse",
    "get_peft_model",
    "masks",
    "ops",
    "overlap",
    "store",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"shira.{name}")
    if name not in _WHERE:
        from shira.errors import did_you_mean

        raise AttributeError(
            f"module 'shira' has no attribute {name!r}.{did_you_mean(name, __all__)}"
        )
    try:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("peft", "transformers", "accelerate"):
            raise
        from shira.errors import MissingDependencyError

        raise MissingDependencyError(
            f"training needs {error.name}, which is not installed: pip install 'shira[peft]'"
        ) from error
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return __all__
