# SPDX-License-Identifier: Apache-2.0
"""The PEFT plugin: importing it puts shira's classes in the place of PEFT's own for SHiRA.

PEFT has no way to replace a method, so `register` names every place in which it keeps one: three
mappings, the names on its packages, and the tuples of the mixed model. The modules that define
PEFT's classes (``peft.tuners.shira.config`` and so on) keep them.

Above ``masks``, ``ops`` and ``store``; the only part of shira, beside ``serve`` and ``cli``, that
imports PEFT and transformers.
"""

from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any, Union, get_args

import peft
import peft.mapping
import peft.mixed_model
import peft.peft_model
import peft.tuners
import peft.tuners.mixed.model as mixed
import peft.tuners.shira
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from peft.tuners.shira.config import ShiraConfig as StockConfig
from peft.tuners.shira.layer import ShiraLayer as StockLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, hotswap, save_and_load
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from shira.errors import AdapterError, MissingDependencyError, TargetError
from shira.tuner import indices as ranks
from shira.tuner.config import ShiraConfig
from shira.tuner.indices import check_ranks
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import Linear
from shira.tuner.loading import check_file, check_loaded, named_for_loading, weights_of
from shira.tuner.masking import calibrate
from shira.tuner.mixed_batch import BASE
from shira.tuner.model import ShiraModel
from shira.tuner.rollback import as_it_was

LOWEST = "0.21.2"
"""The oldest PEFT that shira works with."""
UNKNOWN = "0.22"
"""The first PEFT that no test has seen."""


def register() -> None:
    """Make PEFT use shira's classes, once.

    Raises:
        MissingDependencyError: If PEFT is too old.
    """
    _check_version(peft.__version__)
    if peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA] is ShiraModel:
        return
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SHIRA] = ShiraConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA] = ShiraModel
    peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.SHIRA] = ShiraModel
    for package in (peft, peft.tuners, peft.tuners.shira):
        _replace(package, ShiraConfig=ShiraConfig, ShiraModel=ShiraModel)
    _replace(peft.tuners.shira, ShiraLayer=ShiraLayer, Linear=Linear)
    _register_mixed()
    _register_nesting()
    _register_loading()


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


def _register_loading() -> None:
    """Make PEFT's loading understand wrapped names, and change nothing if it fails."""
    load = save_and_load.set_peft_model_state_dict

    @functools.wraps(load)
    def set_state(
        model: Any,
        state_dict: Any,
        adapter_name: str = "default",
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        if isinstance(model.peft_config.get(adapter_name), ShiraConfig):
            state_dict = named_for_loading(model, adapter_name, state_dict, ignore_mismatched_sizes)
        with as_it_was(model, ShiraLayer):
            return load(model, state_dict, adapter_name, ignore_mismatched_sizes, **kwargs)

    for module in (peft, peft.utils, save_and_load, peft.peft_model, peft.mixed_model):
        if hasattr(module, load.__name__):
            _replace(module, **{load.__name__: set_state})
    for cls in (peft.PeftModel, peft.PeftMixedModel):
        for name in ("add_adapter", "load_adapter", "from_pretrained"):
            if name in vars(cls):
                setattr(cls, name, _restoring(vars(cls)[name]))
    _replace(peft.PeftModel, load_adapter=_checked_again(peft.PeftModel.load_adapter))
    _replace(peft.PeftModel, delete_adapter=_down_to_the_base(peft.PeftModel.delete_adapter))
    read = vars(PeftConfigMixin)["from_pretrained"].__func__
    _replace(PeftConfigMixin, from_pretrained=classmethod(_with_its_weights(read)))
    native = PeftAdapterMixin.load_adapter
    _replace(PeftAdapterMixin, load_adapter=_checked(native))
    for name in ("hotswap_adapter", "hotswap_adapter_from_state_dict"):
        _replace(hotswap, **{name: _not_for_shira(getattr(hotswap, name))})


def _restoring(method: Any) -> Any:
    """Make a method or class method of PEFT's leave the model as it was if it fails."""
    of_class = isinstance(method, classmethod)
    function = method.__func__ if of_class else method

    @functools.wraps(function)
    def restoring(first: Any, *args: Any, **kwargs: Any) -> Any:
        model = (args[0] if args else kwargs.get("model")) if of_class else first
        if not isinstance(model, nn.Module):
            return function(first, *args, **kwargs)
        config = kwargs.get("config", args[4] if of_class and len(args) > 4 else None)
        if of_class and isinstance(config, ShiraConfig):
            config._just_read = True
        with as_it_was(model, ShiraLayer):
            return function(first, *args, **kwargs)

    return classmethod(restoring) if of_class else restoring


def _with_its_weights(read: Any) -> Any:
    """Make PEFT's reading of a configuration note where the weights beside it are."""

    @functools.wraps(read)
    def reading(cls: Any, model_id: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        config = read(cls, model_id, subfolder=subfolder, **kwargs)
        if isinstance(config, ShiraConfig):
            config._source = functools.partial(
                weights_of, model_id, {**kwargs, "subfolder": subfolder}
            )
        return config

    return reading


def _checked_again(load: Any) -> Any:
    """Make PEFT's loading check the file also under a name that is there already.

    PEFT itself does not read the configuration then.
    """

    @functools.wraps(load)
    def loading(model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = model.peft_config.get(adapter_name)
        if isinstance(config, ShiraConfig):
            if not config._just_read:
                check_file(model.get_base_model(), model_id, kwargs)
            config._just_read = False
        return load(model, model_id, adapter_name, *args, **kwargs)

    return loading


def _checked(load: Any) -> Any:
    """Make transformers' own loading of an adapter check what it has loaded."""

    @functools.wraps(load)
    def loading(
        model: Any, path: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        path = kwargs.pop("peft_model_id", path)
        with as_it_was(model, ShiraLayer):
            info = load(model, path, adapter_name, *args, **kwargs)
            check_loaded(model, adapter_name or "default", info)
        return info

    return loading


def _down_to_the_base(delete: Any) -> Any:
    """Make PEFT's deletion of the last adapter leave a model that runs as the base."""

    @functools.wraps(delete)
    def deleting(model: Any, adapter_name: str) -> None:
        delete(model, adapter_name)
        if isinstance(model.base_model, ShiraModel) and not model.peft_config:
            model.active_adapter = BASE

    return deleting


def _not_for_shira(swap: Any) -> Any:
    """Make PEFT's hot swapping, which is for LoRA's tensors, refuse a model of SHiRA's."""

    @functools.wraps(swap)
    def refusing(model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, ShiraLayer) for module in model.modules()):
            raise AdapterError(
                "hot swapping is PEFT's for LoRA; load the other SHiRA adapter beside the first "
                "with load_adapter and switch with set_adapter, or use shira.Switch"
            )
        return swap(model, *args, **kwargs)

    return refusing


def _register_mixed() -> None:
    """Make the mixed model know the classes by isinstance, and by their module's name."""
    known = get_args(mixed.Configs)
    _replace(
        mixed,
        Configs=Union[known + (ShiraConfig,)],  # noqa: RUF005, UP007
        Layers=(*(kind for kind in mixed.Layers if kind is not StockLayer), ShiraLayer),
        shira=SimpleNamespace(
            ShiraConfig=(ShiraConfig, StockConfig), ShiraModel=ShiraModel, ShiraLayer=ShiraLayer
        ),
    )


def _register_nesting() -> None:
    """Make PEFT's other layers safe on top of SHiRA's, where they are, or refuse them."""
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def injecting(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(module, ShiraLayer) for module in model.modules()):
            return inject(self, model, *args, **kwargs)
        with as_it_was(model):
            inject(self, model, *args, **kwargs)
            refuse_over_shira(model)

    of_base: Any = vars(BaseTunerLayer)["weight"].fget

    @functools.wraps(of_base)
    def weight(self: Any) -> Any:
        below = shira_layer_below(self)
        return of_base(self) if below is None else below.weight

    _replace(BaseTuner, inject_adapter=injecting)
    _replace(BaseTunerLayer, weight=property(weight))


def shira_layer_below(layer: Any) -> ShiraLayer | None:
    """Return the SHiRA layer that a layer of another method stands on, if there is one."""
    below = layer._modules.get("base_layer")
    while below is not None and not isinstance(below, ShiraLayer):
        below = below._modules.get("base_layer")
    return below


def refuse_over_shira(model: nn.Module) -> None:
    """Refuse layers on top of SHiRA's that take the base weight for what is below them.

    The methods that PEFT mixes call the layer below and add to it or turn its input; DoRA, and most
    others, read the base weight, and SHiRA's adapter would have no effect.

    Raises:
        TargetError: If there is one.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, ShiraLayer):
            continue
        below = shira_layer_below(module)
        dora = any(getattr(module, "use_dora", {}).values())
        if below is not None and (dora or not isinstance(module, mixed.Layers)):
            kind = "DoRA" if dora else type(module).__name__
            raise TargetError(
                f"{name}: {kind} computes with the base weight, in which it would not see the "
                f"SHiRA adapters {sorted(below.shira_weight)} below it; merge these first "
                "(merge_and_unload), or leave the layer out of its target_modules"
            )


def _replace(module: ModuleType | type, **names: Any) -> None:
    for name, value in names.items():
        setattr(module, name, value)


register()
# The module that check_ranks was in before.
sys.modules[f"{__name__}.ranks"] = ranks

__all__ = [
    "PeftModel",
    "ShiraConfig",
    "ShiraLayer",
    "ShiraModel",
    "calibrate",
    "check_ranks",
    "get_peft_model",
]
