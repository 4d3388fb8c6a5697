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
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Union, get_args

import peft
import peft.mapping
import peft.mixed_model
import peft.peft_model
import peft.tuners
import peft.tuners.lora.conversion as conversion
import peft.tuners.mixed.model as mixed
import peft.tuners.shira
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from peft.tuners.shira.config import ShiraConfig as StockConfig
from peft.tuners.shira.layer import ShiraLayer as StockLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, save_and_load
from peft.utils import hotswap as pefts_hotswap
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from shira.errors import AdapterError, MissingDependencyError, TargetError
from shira.tuner import hotswap, native, to_lora
from shira.tuner import indices as ranks
from shira.tuner.config import ShiraConfig
from shira.tuner.indices import check_ranks
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import Linear
from shira.tuner.loading import check_file, check_loaded, named_for_loading, weights_of
from shira.tuner.masking import calibrate
from shira.tuner.mixed_batch import BASE
from shira.tuner.model import ShiraModel
from shira.tuner.optimizer import FactoredAdamW
from shira.tuner.rollback import as_it_was
from shira.tuner.saving import layers_of

LOWEST = "0.21.2"
"""The oldest PEFT that shira works with."""
UNKNOWN = "0.22"
"""The first PEFT that no test has seen."""


def register() -> None:
    """Make PEFT use shira's classes, once."""
    _check_version(peft.__version__)
    if peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA] is ShiraModel:
        return
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SHIRA] = ShiraConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA] = ShiraModel
    peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.SHIRA] = ShiraModel
    for package in (peft, peft.tuners, peft.tuners.shira):
        _replace(package, ShiraConfig=ShiraConfig, ShiraModel=ShiraModel)
    _replace(peft.tuners.shira, ShiraLayer=ShiraLayer, Linear=Linear)
    _replace(  # the mixed model asks by isinstance, and calls the model class by its module's name
        mixed,
        Configs=Union[get_args(mixed.Configs) + (ShiraConfig,)],  # noqa: RUF005, UP007
        Layers=(*(kind for kind in mixed.Layers if kind is not StockLayer), ShiraLayer),
        shira=SimpleNamespace(
            ShiraConfig=(ShiraConfig, StockConfig), ShiraModel=ShiraModel, ShiraLayer=ShiraLayer
        ),
    )
    load = save_and_load.set_peft_model_state_dict
    for module in (peft, peft.utils, save_and_load, peft.peft_model, peft.mixed_model):
        if getattr(module, load.__name__, None) is load:
            _put_around(module, load.__name__, _set_state)
    for cls in (peft.PeftModel, peft.PeftMixedModel):
        for name in ("add_adapter", "load_adapter", "from_pretrained"):
            if name in vars(cls):
                _put_around(cls, name, _restore)
    _put_around(peft.PeftModel, "load_adapter", _check_again)
    _put_around(peft.PeftModel, "delete_adapter", _delete_down_to_the_base)
    _put_around(PeftConfigMixin, "from_pretrained", _note_weights)
    _put_around(PeftAdapterMixin, "load_adapter", _check_after)
    _put_around(PeftAdapterMixin, "add_adapter", _tell_trainer)
    pefts_hotswap.CONFIG_KEYS_TO_CHECK[PeftType.SHIRA] = []  # `hotswap.exchange` checks
    _put_around(pefts_hotswap, "hotswap_adapter_from_state_dict", _swap)
    _put_around(pefts_hotswap, "_convert_scalings_to_tensor", _hold)
    _put_around(pefts_hotswap, "_pad_lora_weights", _pad)
    convert = conversion.convert_to_lora
    for module in (peft, peft.tuners, peft.tuners.lora, conversion):
        if getattr(module, convert.__name__, None) is convert:
            _put_around(module, convert.__name__, _convert)
    _put_around(conversion, "_convert_module_to_lora", _refuse_to_convert)
    _put_around(BaseTuner, "inject_adapter", _inject_over_shira)
    of_base: Any = vars(BaseTunerLayer)["weight"].fget

    def weight(layer: Any) -> Any:
        below = shira_layer_below(layer)
        return of_base(layer) if below is None else below.weight

    _replace(BaseTunerLayer, weight=property(weight))


def _replace(owner: ModuleType | type, **names: Any) -> None:
    for name, value in names.items():
        setattr(owner, name, value)


def _put_around(owner: ModuleType | type, name: str, function: Callable[..., Any]) -> None:
    """Have a function called in the place of another, or of a method, with that as first."""
    found = vars(owner)[name]
    of_class = isinstance(found, classmethod)
    original = found.__func__ if of_class else found

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    setattr(owner, name, classmethod(call) if of_class else call)


def _check_version(version: str) -> None:
    """Refuse a PEFT that is too old, and warn of one that no test has seen."""
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


# ------------------------------------------------------------------- put around functions of PEFT


def _set_state(
    load: Any,
    model: Any,
    state_dict: Any,
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    **kwargs: Any,
) -> Any:
    """Understand the names of other wrappings, and change nothing if loading fails."""
    if isinstance(model.peft_config.get(adapter_name), ShiraConfig):
        state_dict = named_for_loading(model, adapter_name, state_dict, ignore_mismatched_sizes)
    with as_it_was(model, ShiraLayer):
        return load(model, state_dict, adapter_name, ignore_mismatched_sizes, **kwargs)


def _restore(method: Any, first: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave the model as it was if a method, or class method, fails."""
    of_class = isinstance(first, type)
    model = (args[0] if args else kwargs.get("model")) if of_class else first
    if not isinstance(model, nn.Module):
        return method(first, *args, **kwargs)
    config = kwargs.get("config", args[4] if of_class and len(args) > 4 else None)
    if of_class and isinstance(config, ShiraConfig):
        config._just_read = True
    with as_it_was(model, ShiraLayer):
        return method(first, *args, **kwargs)


def _note_weights(
    read: Any, cls: Any, model_id: Any, subfolder: str | None = None, **kwargs: Any
) -> Any:
    """Note in a configuration that is read where the weights beside it are."""
    config = read(cls, model_id, subfolder=subfolder, **kwargs)
    if isinstance(config, ShiraConfig):
        options = {**kwargs, "subfolder": subfolder}
        config._source = functools.partial(weights_of, model_id, options)
        config._where = str(model_id), subfolder
    return config


def _check_again(
    load: Any, model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Check a file also if it is loaded under a name that is there, where PEFT reads no config."""
    config = model.peft_config.get(adapter_name)
    where = str(model_id), kwargs.get("subfolder")
    if isinstance(config, ShiraConfig) and config._just_read not in (True, where):
        check_file(model.get_base_model(), model_id, kwargs)
    result = load(model, model_id, adapter_name, *args, **kwargs)
    if isinstance(config := model.peft_config[adapter_name], ShiraConfig):
        config._just_read = None
    return result


def _check_after(
    load: Any, model: Any, path: Any = None, adapter_name: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Check what transformers' own loading has put into a model."""
    path = kwargs.pop("peft_model_id", path)
    with as_it_was(model, ShiraLayer):
        info = load(model, path, adapter_name, *args, **kwargs)
        check_loaded(model, adapter_name or "default", info)
    return info


def _tell_trainer(add: Any, model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """Have Trainer resume a model whose adapter transformers itself has put in."""
    add(model, config, *args, **kwargs)
    if native.is_native(model):
        _put_around_trainer()


@functools.cache
def _put_around_trainer() -> None:
    from transformers import Trainer  # takes seconds, and is about to be used

    _put_around(Trainer, "_load_from_checkpoint", native.resume)
    _put_around(Trainer, "_load_best_model", native.load_best)


def _delete_down_to_the_base(delete: Any, model: Any, adapter_name: str) -> None:
    """Leave a model that runs as the base when the last adapter is deleted."""
    delete(model, adapter_name)
    if isinstance(model.base_model, ShiraModel) and not model.peft_config:
        model.active_adapter = BASE


def _swap(
    swap: Any, model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kw: Any
) -> Any:
    """Exchange an adapter of SHiRA's; others as PEFT does."""
    if isinstance(config, ShiraConfig) or layers_of(model, adapter_name):
        return hotswap.exchange(model, state_dict, adapter_name, config)
    return swap(model, state_dict, adapter_name, config, *args, **kw)


def _hold(convert: Any, model: nn.Module) -> bool:
    """Prepare SHiRA's layers too for a compiled exchange."""
    ours = hotswap.hold(model)
    return bool(convert(model)) or ours


def _pad(pad: Any, model: nn.Module, target_rank: int) -> bool:
    """Give SHiRA's layers room too for adapters up to a rank."""
    ours = hotswap.pad(model, target_rank)
    return bool(pad(model, target_rank)) or ours


def _convert(convert: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Convert an adapter of a model with SHiRA's layers to LoRA; others as PEFT does."""
    return (to_lora.convert_to_lora if layers_of(model) else convert)(model, *args, **kwargs)


def _refuse_to_convert(convert: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a layer of ours in PEFT's own conversion, which has been imported before shira was."""
    if isinstance(layer, ShiraLayer):
        raise AdapterError(
            "this is PEFT's convert_to_lora as it was before shira was imported; import shira "
            "first, or call peft.convert_to_lora"
        )
    return convert(layer, *args, **kwargs)


def _inject_over_shira(
    inject: Any, tuner: Any, model: nn.Module, *args: Any, **kwargs: Any
) -> None:
    """Refuse other methods' layers on top of SHiRA's that take the base weight for what is below.

    The methods that PEFT mixes call the layer below and add to it or turn its input; DoRA, and most
    others, read the base weight, and SHiRA's adapter would have no effect.
    """
    with as_it_was(model, ShiraLayer):
        inject(tuner, model, *args, **kwargs)
        for name, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer) or isinstance(module, ShiraLayer):
                continue
            below = shira_layer_below(module)
            dora = below is not None and any(getattr(module, "use_dora", {}).values())
            dora |= hasattr(module, "parameter_name")  # LoRA in a parameter by its name
            if below is not None and (dora or not isinstance(module, mixed.Layers)):
                kind = (
                    "DoRA"
                    if any(getattr(module, "use_dora", {}).values())
                    else type(module).__name__
                )
                raise TargetError(
                    f"{name}: {kind} computes with the base weight, in which it would not see the "
                    f"SHiRA adapters {sorted(below.shira_weight)} below it; merge these first "
                    "(merge_and_unload), or leave the layer out of its target_modules"
                )


def shira_layer_below(layer: Any) -> ShiraLayer | None:
    """Return the SHiRA layer that a layer of another method stands on, if there is one."""
    while (layer := layer._modules.get("base_layer")) is not None:
        if isinstance(layer, ShiraLayer):
            return layer
    return None


register()
# The module that check_ranks was in before.
sys.modules[f"{__name__}.ranks"] = ranks

__all__ = [
    "FactoredAdamW",
    "PeftModel",
    "ShiraConfig",
    "ShiraLayer",
    "ShiraModel",
    "calibrate",
    "check_ranks",
    "get_peft_model",
]
