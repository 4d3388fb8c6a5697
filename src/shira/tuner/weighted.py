# SPDX-License-Identifier: Apache-2.0
"""``add_weighted_adapter``: adapters of a model fused into a further one, as PEFT's LoRA has it.

The adapters are taken out as values, `shira.fuse` combines them, and the result is put in like any
other adapter: it can be activated, merged, trained on and saved.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, UnknownAdapterError, did_you_mean
from shira.fusing import METHODS, fill_to_rank, fuse
from shira.fusing.result import FUSED, MASK_FIELDS, TARGET_FIELDS
from shira.store.names import base_module_name, weight_name
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.masking import SupportTable
from shira.tuner.targets import matched_modules

COMBINATIONS = {
    "linear": "sum",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare_ties",
    "magnitude_prune": "magnitude_prune",
    **{name: name for name in METHODS},
}
"""PEFT's names of combination types, and ours, to methods of `shira.fuse`."""


def add_weighted_adapter(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    **options: Any,
) -> None:
    """What `ShiraModel.add_weighted_adapter` documents."""
    method = _checked(model, adapters, adapter_name, combination_type)
    owners = _owners_of_saved_modules(model, adapters)
    fused = fuse(
        [_scaled(model, name) for name in adapters],
        weights,
        method,
        check_base=False,  # they stand in one model
        names=[f"adapter {name!r}" for name in adapters],
        **options,
    )
    kept_mask = fused.metadata.get("mask_type") != FUSED
    r = fused.metadata.get("r") if kept_mask else None
    if not isinstance(r, int):
        r, fused = fill_to_rank(fused)
    config = _config(model, adapters, fused, r, kept_mask)
    config.modules_to_save = sorted({name for name, _, _ in owners}) or None
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except BaseException:
        del model.peft_config[adapter_name]
        raise
    for parameter in trainable:  # PEFT freezes all adapters when it adds a frozen one
        parameter.requires_grad_(True)
    for name, layer in _layers(model):
        if adapter_name in layer.shira_weight:
            device = layer.shira_weight[adapter_name].device
            values = fused[name].values.to(device)
            layer.shira_weight[adapter_name] = nn.Parameter(values.clone(), requires_grad=False)
    for _, wrapper, owner in owners:
        wrapper.update(adapter_name)
        copy, original = (wrapper.modules_to_save[name] for name in (adapter_name, owner))
        copy.load_state_dict(original.state_dict())
        copy.requires_grad_(False)


def _checked(
    model: BaseTuner, adapters: Sequence[str], adapter_name: str, combination_type: str
) -> str:
    """The method of `shira.fuse`, after making sure that the names are what they should be."""
    if isinstance(adapters, str):
        raise ConfigError(f"adapters is a list of names, not {adapters!r}")
    for name in adapters:
        if name not in model.peft_config:
            raise UnknownAdapterError(
                f"Adapter {name} does not exist; the model has {', '.join(model.peft_config)}."
                f"{did_you_mean(name, model.peft_config)}"
            )
    if adapter_name in model.peft_config:
        raise AdapterError(
            f"there is an adapter {adapter_name!r} already; delete_adapter({adapter_name!r}) makes "
            "room for another"
        )
    if combination_type in COMBINATIONS:
        return COMBINATIONS[combination_type]
    hint = (
        " Those with factors ('svd', 'cat') are LoRA's; here 'linear' is the exact sum."
        if combination_type == "cat" or combination_type.endswith("svd")
        else did_you_mean(combination_type, COMBINATIONS)
    )
    raise ConfigError(
        f"Invalid combination_type: {combination_type!r}; there are {', '.join(COMBINATIONS)}."
        f"{hint}"
    )


def _owners_of_saved_modules(
    model: BaseTuner, adapters: Sequence[str]
) -> list[tuple[str, ModulesToSaveWrapper, str]]:
    """Modules that one of the adapters has trained whole: name, wrapper and adapter."""
    found: list[tuple[str, ModulesToSaveWrapper, str]] = []
    for name, wrapper in model.model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        owners = [adapter for adapter in adapters if adapter in wrapper.modules_to_save]
        if len(owners) > 1:
            raise AdapterError(
                "Cannot add weighted adapters if they target the same module with modules_to_save: "
                f"{name!r} is trained whole by {' and '.join(map(repr, owners))}. To fuse the "
                "sparse parts alone, use shira.fuse on Adapter.from_model(model, name)"
            )
        found.extend((name, wrapper, owner) for owner in owners)
    return found


def _layers(model: BaseTuner) -> list[tuple[str, ShiraLayer]]:
    """The adapted layers, by the base model's name of their weight."""
    return [
        (weight_name(base_module_name(path)), layer)
        for path, layer in model.model.named_modules()
        if isinstance(layer, ShiraLayer)
    ]


def _scaled(model: BaseTuner, adapter_name: str) -> Adapter:
    """An adapter's deltas, times what `set_scale` has set in each layer.

    Modules that it trains whole have their owner already.
    """
    adapter = Adapter.from_model(model.model, adapter_name)
    scales = {name: layer.scaling.get(adapter_name, 1.0) for name, layer in _layers(model)}
    if all(scale == 1.0 for scale in scales.values()):
        return Adapter(adapter, adapter.metadata)
    return Adapter(
        {name: SparseDelta(d.support, d.values * scales[name]) for name, d in adapter.items()},
        adapter.metadata,
    )


def _config(
    model: BaseTuner, adapters: Sequence[str], fused: Adapter, r: int, kept_mask: bool
) -> ShiraConfig:
    """The first adapter's config, with what is true of the fused one."""
    first: Any = model.peft_config[adapters[0]]
    defaults: Any = ShiraConfig(inference_mode=True)
    mask = {field: getattr(first if kept_mask else defaults, field) for field in MASK_FIELDS}
    if not kept_mask:
        mask["mask_type"] = FUSED
    config: ShiraConfig = dataclasses.replace(
        first,
        **{**mask, "r": r},
        modules_to_save=None,
        inference_mode=True,
        base_fingerprint=None,
        base_fingerprint_rounded=None,
        shira_shapes=None,
        fused=fused.metadata.get(FUSED),
    )
    config.mask_fn = SupportTable({name: delta.support for name, delta in fused.items()})
    config._source = None
    _set_targets(config, model, {name.removesuffix(".weight") for name in fused})
    return config


def _set_targets(config: ShiraConfig, model: BaseTuner, modules: set[str]) -> None:
    """Make the config name exactly these modules: as it does, by name, or by an expression."""
    if _matches(config, model, modules):
        return
    for field in TARGET_FIELDS:
        setattr(config, field, None)
    config.target_modules = set(modules)
    if not _matches(config, model, modules):  # one name is the end of another
        config.target_modules = "|".join(re.escape(name) for name in sorted(modules))


def _matches(config: ShiraConfig, model: BaseTuner, modules: set[str]) -> bool:
    matched = dict(matched_modules(config, model.model))
    inside = tuple(f"{name}." for name, m in matched.items() if isinstance(m, ShiraLayer))
    found = {name for name in matched if not name.startswith(inside)}
    return {base_module_name(name) for name in found} == modules
