# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the support of one layer: `support_of_layer`.

Built-in masks are rows of ``shira.masks``; masks chosen on data come as a `SupportTable` from
`shira.calibrate`; a user's own ``mask_fn`` is called as PEFT documents it. All of them are
``config.mask_fn``, called with the base layer and r.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shira.errors import MaskError, did_you_mean
from shira.masks import MASKS, choose, custom_support
from shira.store.names import full_shape
from shira.support import Support
from shira.tuner.base_layer import base_of, readable, weight_of
from shira.tuner.quantized import unpacked
from shira.tuner.undo import pristine

if TYPE_CHECKING:
    from shira.tuner.config import ShiraConfig


class BuiltinMask:
    """``config.mask_fn`` of the built-in masks: ``mask_fn(base_layer, r, *, name)``."""

    def __init__(self, config: ShiraConfig) -> None:
        self.config = config

    @property
    def looks_at_weight(self) -> bool:
        """Return whether the mask depends on the weight's values."""
        config = self.config
        return "weight" in MASKS[config.mask_type].needs_with(config.mask_options)

    def __call__(self, base_layer: nn.Module, r: int, *, name: str = "", **_: Any) -> Support:
        """The mask of one layer; see `shira.masks.choose` for what can go wrong."""
        config, weight = self.config, weight_of(base_layer)
        shape, looks = full_shape(weight), self.looks_at_weight
        with readable(base_layer) if looks else nullcontext():
            return choose(
                config.mask_type,
                shape,
                config.entries(shape, r, name),
                weight=_values_of(base_layer, name) if looks else None,
                seed=config.draw_seed(),
                name=name,
                slot=config.mask_slot,
                **(config.mask_options or {}),
            )


class SupportTable:
    """``config.mask_fn`` of a calibrated configuration: supports by parameter name."""

    looks_at_weight = False

    def __init__(self, supports: Mapping[str, Support]) -> None:
        self.supports = dict(supports)

    def __call__(self, base_layer: nn.Module, r: int, *, name: str = "", **_: Any) -> Support:
        """The layer's support, by its parameter name; MaskError if there is none."""
        try:
            return self.supports[name]
        except KeyError:
            raise MaskError(
                f"{name}: this configuration was calibrated for other parameters."
                f"{did_you_mean(name, self.supports)} Run shira.calibrate with the target_modules "
                "that you mean to train"
            ) from None


def support_of_layer(config: ShiraConfig, layer: nn.Module, name: str, r: int) -> Support:
    """Choose the entries to train in one layer.

    Args:
        config: Its mask function, budget, seed and options.
        layer: The layer to adapt, or an adapted one that gets a further adapter; masks see the
            base, also while adapters are merged into its weight.
        name: The weight's parameter name in the base model: part of the key of random masks.
        r: The layer's rank (``rank_pattern`` may give layers their own).

    Returns:
        A support on the CPU.

    Raises:
        MaskError: If there is no mask function, or what it returns does not fit.
    """
    mask_fn = config.mask_fn
    if mask_fn is None:
        raise MaskError(
            f"{name}: mask_type={config.mask_type!r} is not built in and config.mask_fn is not "
            f"set; built in are {', '.join(MASKS)}.{did_you_mean(config.mask_type, MASKS)}"
        )
    base_layer = pristine(layer) if getattr(mask_fn, "looks_at_weight", True) else base_of(layer)
    shape = full_shape(weight_of(base_layer))
    if isinstance(mask_fn, (BuiltinMask, SupportTable)):
        support = mask_fn(base_layer, r, name=name)
    else:
        given = {"name": name, "random_seed": config.random_seed}
        with readable(base_layer):
            mask: Tensor | Support = mask_fn(base_layer, r, **_accepted(mask_fn, given))
        support = custom_support(
            mask, shape, config.entries(shape, r, name), what=f"mask_fn for {name}"
        )
    return support.to("cpu")


def needs_placeholder(config: ShiraConfig) -> bool:
    """Whether the mask of an adapter that is about to be read cannot be made again."""
    if not config.inference_mode:
        return False
    mask_fn = config.mask_fn
    if isinstance(mask_fn, BuiltinMask):
        return "gradient" in MASKS[config.mask_type].needs_with(config.mask_options)
    return mask_fn is None


def placeholder(config: ShiraConfig, base_layer: nn.Module, name: str, r: int) -> Support:
    """A support of the right size for a layer whose entries are about to be read from a file."""
    shape = full_shape(weight_of(base_layer))
    k = config.entries(shape, r, name)
    return Support(shape, torch.arange(k))


def _values_of(base_layer: nn.Module, name: str) -> Tensor:
    """The weight for a mask that looks at it; a packed one dequantized, for as long as it looks.

    Raises:
        MaskError: If it is packed in a way that PEFT cannot unpack.
    """
    values = unpacked(base_layer)
    if values is None:
        raise MaskError(
            f"{name}: the mask is chosen by the weight's values, but they are quantized in a way "
            "that cannot be unpacked; choose by position: mask_type 'random', 'struct', 'block' or "
            "'block_diagonal'"
        )
    return values


def _accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(given)
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in given.items() if key in names}
