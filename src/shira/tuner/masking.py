# SPDX-License-Identifier: Apache-2.0
"""The entries to train in each layer: `support_of_layer`, and `calibrate` where gradients choose.

Built-in masks are rows of ``shira.masks``; masks chosen on data come as a `SupportTable` from
`calibrate`; a user's own ``mask_fn`` is called as PEFT documents it. All of them are
``config.mask_fn``, called with the base layer and r.

To calibrate, the gradient of each target weight is needed densely, for an instant: it is added to
one float32 buffer of the weight's size and freed before the next layer's is made. With
``group_size`` only so many layers have a buffer at a time, for as many passes over the batches as
that takes.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from tqdm.auto import tqdm

from shira.errors import ConfigError, MaskError, MergeError, TargetError, did_you_mean
from shira.masks import MASKS, custom_support
from shira.store.names import full_shape
from shira.support import Support
from shira.tuner.base_layer import Layer, ParameterOf, base_of, pristine, readable, weight_of
from shira.tuner.config import ShiraConfig, as_ours
from shira.tuner.layers import layer_class_of
from shira.tuner.quantized import backend_of
from shira.tuner.targets import check_target, checked_targets

LossFn = Callable[[nn.Module, Any], Tensor]


class SupportTable:
    """``config.mask_fn`` of a calibrated configuration: supports by parameter name."""

    def __init__(self, supports: Mapping[str, Support]) -> None:
        self.supports = dict(supports)

    def __call__(self, base_layer: Any, r: int, *, name: str = "", **_: Any) -> Support:
        """Return the layer's support, by its parameter name; MaskError if there is none."""
        try:
            return self.supports[name]
        except KeyError:
            raise MaskError(
                f"{name}: this configuration was calibrated for other parameters."
                f"{did_you_mean(name, self.supports)} Run shira.calibrate with the target_modules "
                "that you mean to train"
            ) from None


def support_of_layer(config: ShiraConfig, layer: Layer, name: str, r: int) -> Support:
    """Choose the entries to train in one layer, which may be adapted already; on the CPU.

    Masks see the base, also while adapters are merged into its weight. An adapter that is about to
    be read from a file, whose mask cannot be made again, gets one of the right size.
    """
    mask_fn, shape = config.mask_fn, full_shape(weight_of(layer))
    builtin = getattr(mask_fn, "__func__", None) is ShiraConfig.builtin_mask
    from_gradients = builtin and "gradient" in config.mask_needs
    if config.inference_mode and (mask_fn is None or from_gradients):
        return Support(shape, torch.arange(config.entries(shape, r, name)))
    if mask_fn is None:
        raise MaskError(
            f"{name}: mask_type={config.mask_type!r} is not built in and config.mask_fn is not "
            f"set; built in are {', '.join(MASKS)}.{did_you_mean(config.mask_type, MASKS)}"
        )
    if isinstance(mask_fn, SupportTable):
        return mask_fn(None, r, name=name).to("cpu")
    if builtin:
        looks = "weight" in config.mask_needs
        return config.builtin_mask(pristine(layer) if looks else layer, r, name=name).to("cpu")
    base_layer, given = pristine(layer), {"name": name, "random_seed": config.random_seed}
    with readable(base_layer):
        mask: Tensor | Support = mask_fn(base_layer, r, **_accepted(mask_fn, given))
    k = config.entries(shape, r, name)
    return custom_support(mask, shape, k, what=f"mask_fn for {name}").to("cpu")


def _accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the keyword arguments that the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(given)
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in given.items() if key in names}


def calibrate(
    model: nn.Module,
    config: ShiraConfig,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    group_size: int | None = None,
    progress: bool = True,
) -> ShiraConfig:
    """Choose a configuration's masks from gradients (paper sec. 3.1 and eq. 2).

    The score of an entry is the sum over the batches of the magnitude of its gradient, for
    ``snip`` times the magnitude of the weight. The model runs in eval mode, so the result depends
    on model and batches alone; weights, modes and ``requires_grad`` are afterwards as before.

    Args:
        model: The base model, not yet adapted.
        config: With ``mask_type`` ``"grad"`` or ``"snip"``, or ``"block"`` with one of them as
            ``mask_options={"score": ...}``; targets and budget as for training.
        batches: Mappings (called as ``model(**batch)``), sequences (``model(*batch)``) or tensors.
        loss_fn: ``loss_fn(model, batch)``, a scalar; default the ``loss`` of the model's output.
        group_size: How many layers to score at a time; default all of them. Fewer take less memory
            and more passes, so the batches must then be a list or the like.
        progress: Show a progress bar on a terminal.

    Returns:
        A copy of the configuration, ready for ``get_peft_model`` on this model.

    Raises:
        ConfigError: If the mask needs no gradients, or there are no batches.
        TargetError: If a target does not exist or has no weight to differentiate.
        MaskError: If the budget does not fit a weight, or a gradient is not finite.
        MergeError: If adapters are merged into the model, or a `shira.Switch` is active on it.
    """
    _refuse_merged(model)
    config = copy.deepcopy(as_ours(config))
    if "gradient" not in config.mask_needs:
        known = [name for name, spec in MASKS.items() if "gradient" in spec.needs]
        options = f" with mask_options={config.mask_options}" if config.mask_options else ""
        raise ConfigError(
            f"mask_type={config.mask_type!r}{options} is not chosen from gradients and needs no "
            f"calibration; those that are: {', '.join(known)}, and 'block' with "
            f"mask_options={{'score': 'grad'}} or 'snip'"
        )
    layers = _target_weights(model, config)
    group_size = len(layers) if group_size is None else group_size
    if group_size < 1:
        raise ConfigError(f"group_size is at least 1, not {group_size}")
    groups = [layers[at : at + group_size] for at in range(0, len(layers), group_size)]
    if len(groups) > 1 and iter(batches) is batches:
        raise ConfigError(
            f"{len(layers)} layers in groups of {group_size} take {len(groups)} passes over the "
            "batches, but they are an iterator that can be read once; pass a list"
        )
    supports: dict[str, Support] = {}
    with _frozen_in_eval_mode(model):
        for number, group in enumerate(groups, start=1):
            title = f"Calibrating {number}/{len(groups)}" if len(groups) > 1 else "Calibrating"
            shown = tqdm(batches, desc=title, disable=None if progress else True)
            scores = _gradient_magnitudes(model, group, shown, loss_fn or _loss_of_output)
            for name, weight in group:
                supports[name] = _choose(config, name, weight, scores.pop(name))
    config.mask_fn = SupportTable(supports)
    return config


def _refuse_merged(model: nn.Module) -> None:
    """Refuse a model whose gradients are not those of the base."""
    for name, module in model.named_modules():
        where, undo = "", ""
        if merged := getattr(module, "merged_adapters", None):
            where, undo = f"adapters {list(merged)} are merged into", "unmerge_adapter()"
        elif getattr(module._parameters.get("weight"), "shira_patch", None) is not None:
            where, undo = "a shira.Switch has an adapter in", "its deactivate()"
        if where:
            raise MergeError(
                f"{name}: {where} the weight, so its gradient is not the base's; call {undo} first"
            )


def _target_weights(model: nn.Module, config: ShiraConfig) -> list[tuple[str, Any]]:
    if config.target_modules is None and not config.target_parameters:
        model_type = str(BaseTuner.get_model_config(model).get("model_type"))
        targets = TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING.get(model_type)
        if targets is None:
            raise TargetError(
                f"there are no default targets for {model_type!r}; set target_modules"
            )
        config.target_modules = targets if isinstance(targets, str) else set(targets)
    matched = checked_targets(config, model, some=True)
    found: list[tuple[str, Any]] = []
    for target in matched.targets:
        if not target.of_parameter and target.path not in matched.by_name:
            continue
        layer, held = target.layer, isinstance(target.layer, ParameterOf)
        known = held or (layer_class_of(layer) and hasattr(layer, "weight"))
        weight = weight_of(layer) if known else None
        if not isinstance(weight, Tensor):
            raise TargetError(f"{target.path} ({type(layer).__name__}) cannot be adapted")
        if not weight.is_floating_point() or backend_of(base_of(layer)) is not None:
            raise TargetError(
                f"{target.path}: a quantized weight ({type(weight).__name__}, {weight.dtype}) has "
                "no gradient; calibrate on the unquantized model, and use the config on this one"
            )
        if held:
            check_target(target)
        found.append((target.name, weight))
    return found


def _gradient_magnitudes(
    model: nn.Module, group: Sequence[tuple[str, Any]], batches: Iterable[Any], loss_fn: LossFn
) -> dict[str, Tensor]:
    """Return the sum over the batches of each weight's gradient's magnitude, in float32."""
    totals: dict[str, Tensor] = {}
    handles = []

    def collect(name: str, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None and name in totals:
            totals[name] += gradient.to_dense().abs_()
        elif gradient is not None:
            totals[name] = gradient.to_dense().abs_().float()

    try:
        for name, weight in group:
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(partial(collect, name)))
        count = 0
        for batch in batches:
            # a mapping of its own: some move in place, and some cannot be made of their entries
            batch = dict(batch) if isinstance(batch, Mapping) else batch
            loss = loss_fn(model, send_to_device(batch, next(model.parameters()).device))
            loss.backward()  # type: ignore[no-untyped-call]
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for _, weight in group:
            weight.requires_grad_(False)
    if not count:
        raise ConfigError("there are no batches to calibrate on")
    for name, weight in group:
        if name not in totals:
            warnings.warn(
                f"{name}: no gradient reached it on the calibration batches; its mask falls on the "
                "first entries",
                stacklevel=3,
            )
            totals[name] = torch.zeros_like(weight, dtype=torch.float32)
    return totals


def _choose(config: ShiraConfig, name: str, weight: Tensor, score: Tensor) -> Support:
    if not torch.isfinite(score).all():
        raise MaskError(f"{name}: its gradient is not finite on the calibration batches")
    return config.choose_by_gradient(name, weight.detach(), score)


@contextmanager
def _frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter and put every module into eval mode, until the end."""
    parameters = [(each, each.requires_grad, each.grad) for each in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False).eval()
        model.zero_grad()
        yield
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, mode in training:
            module.training = mode


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (list, tuple)):
        output = model(*batch)
    else:
        output = model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "the model's output has no loss; put labels into the batches, or pass "
            "loss_fn=lambda model, batch: ..."
        )
    return loss
