# SPDX-License-Identifier: Apache-2.0
"""Puts shira's classes in the place of PEFT's own for the method SHIRA.

PEFT has no way to replace a method, so this names every place in which it keeps one: three
mappings, the names on its packages, and the tuples of the mixed model. The modules that define
PEFT's classes (``peft.tuners.shira.config`` and so on) keep them.
"""

from __future__ import annotations

import functools
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
from peft.utils import PeftType, save_and_load

from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.linear import Linear
from shira.tuner.model import ShiraModel
from shira.tuner.saving import in_few_bytes


def register() -> None:
    """Make PEFT use shira's classes; doing it again changes nothing."""
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SHIRA] = ShiraConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA] = ShiraModel
    peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.SHIRA] = ShiraModel
    for package in (peft, peft.tuners, peft.tuners.shira):
        _replace(package, ShiraConfig=ShiraConfig, ShiraModel=ShiraModel)
    _replace(peft.tuners.shira, ShiraLayer=ShiraLayer, Linear=Linear)
    _register_mixed()
    if Version(peft.__version__) < Version("0.21"):
        _register_saving()


def _register_saving() -> None:
    """PEFT before 0.21 has no hook for what is saved: wrap the function that collects it."""
    collect = save_and_load.get_peft_model_state_dict
    if hasattr(collect, "__wrapped__"):
        return

    @functools.wraps(collect)
    def in_fewer(
        model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        collected = collect(model, state_dict, adapter_name, *args, **kwargs)
        config = model.peft_config[adapter_name]
        if isinstance(config, ShiraConfig):
            return in_few_bytes(collected, config.save_dtype)
        return collected

    for module in (peft, peft.utils, save_and_load, peft.peft_model):
        _replace(module, get_peft_model_state_dict=in_fewer)


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
