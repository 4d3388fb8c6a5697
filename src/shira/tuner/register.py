# SPDX-License-Identifier: Apache-2.0
"""Puts shira's classes in the place of PEFT's own for the method SHIRA.

PEFT has no way to replace a method, so this names every place in which it keeps one: three
mappings, the names on its packages, and the tuples of the mixed model. The modules that define
PEFT's classes (``peft.tuners.shira.config`` and so on) keep them.
"""

from __future__ import annotations

import warnings
from types import ModuleType, SimpleNamespace
from typing import Any, Union, get_args

import peft
import peft.mapping
import peft.peft_model
import peft.tuners
import peft.tuners.mixed.model as mixed
import peft.tuners.shira
from packaging.version import Version
from peft.tuners.shira.config import ShiraConfig as StockConfig
from peft.tuners.shira.layer import ShiraLayer as StockLayer
from peft.utils import PeftType

from shira.errors import MissingDependencyError
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.linear import Linear
from shira.tuner.model import ShiraModel

LOWEST = "0.21.2"
"""The oldest PEFT that shira works with."""
UNKNOWN = "0.22"
"""The first PEFT that no test has seen."""


def register() -> None:
    """Make PEFT use shira's classes; doing it again changes nothing.

    Raises:
        MissingDependencyError: If PEFT is too old.
    """
    _check_version(peft.__version__)
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SHIRA] = ShiraConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA] = ShiraModel
    peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.SHIRA] = ShiraModel
    for package in (peft, peft.tuners, peft.tuners.shira):
        _replace(package, ShiraConfig=ShiraConfig, ShiraModel=ShiraModel)
    _replace(peft.tuners.shira, ShiraLayer=ShiraLayer, Linear=Linear)
    _register_mixed()


def _check_version(version: str) -> None:
    """Refuse a PEFT that is too old, and warn of one that no test has seen.

    Raises:
        MissingDependencyError: If it is older than `LOWEST`.
    """
    if Version(version) < Version(LOWEST):
        raise MissingDependencyError(
            f"shira needs PEFT {LOWEST} or newer, but {version} is installed: "
            "pip install -U 'shira[peft]'"
        )
    if Version(version) >= Version(UNKNOWN):
        warnings.warn(
            f"shira is tested with PEFT {LOWEST} up to those before {UNKNOWN}, and {version} is "
            "installed. It may work; if it does not, install an older PEFT or a newer shira",
            stacklevel=2,
        )


def _register_mixed() -> None:
    """The mixed model asks by isinstance, and calls the model class by its module's name."""
    known = get_args(mixed.Configs)
    if ShiraConfig in known:
        return
    _replace(
        mixed,
        Configs=Union[known + (ShiraConfig,)],  # noqa: RUF005, UP007
        Layers=(*(kind for kind in mixed.Layers if kind is not StockLayer), ShiraLayer),
        shira=SimpleNamespace(
            ShiraConfig=(ShiraConfig, StockConfig), ShiraModel=ShiraModel, ShiraLayer=ShiraLayer
        ),
    )


def _replace(module: ModuleType, **names: Any) -> None:
    for name, value in names.items():
        setattr(module, name, value)
