# SPDX-License-Identifier: Apache-2.0
"""``adapter_names=``: an adapter for each sample of a batch.

The model hands the names to its layers by hooks; a layer groups the samples by adapter, and unless
its type can compute all groups together, calls its forward for each group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from shira.errors import AdapterError, MergeError, UnknownAdapterError, did_you_mean
from shira.ops.plain import transforming
from shira.tuner.base_layer import Way, inputs_of, weight_of

BASE = "__base__"
"""In ``adapter_names``: this sample goes through the base model."""


@contextmanager
def adapter_names_in_effect(
    model: BaseTuner, adapter_names: Sequence[str] | None, num_beams: int | None
) -> Iterator[None]:
    """Hand every adapted layer ``adapter_names`` with its input, while the context lasts.

    In a beam search each sample stands ``num_beams`` times, in the encoder once.
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, model.tuner_layer_cls)]
    known = {name for layer in layers for name in layer.shira_weight}
    for name in adapter_names:
        if name not in known | {BASE}:
            raise UnknownAdapterError(
                f"Trying to infer with non-existing adapter(s): {name}."
                f"{did_you_mean(name, known | {BASE})} Known are {', '.join(sorted(known))}, and "
                f"{BASE!r} for the base model."
            )
    once = list(adapter_names)
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in once for _ in range(beams)]
    in_encoder = set(_encoder_modules(model))
    for layer in layers:
        if not layer.disable_adapters:
            _refuse_merged(layer)
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    handles: list[Any] = []
    over = False  # then a hook that an interrupt leaves behind does nothing

    def hand(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        names = once if module in in_encoder else repeated
        return None if over else (args, {**kwargs, "adapter_names": names})

    def end() -> None:
        for layer in layers:
            layer._samples = None
        for handle in handles:
            handle.remove()

    try:
        for module in (*layers, *wrappers):
            handles.append(module.register_forward_pre_hook(hand, with_kwargs=True))
        for layer in layers:
            layer._samples = once
        yield
    finally:
        over = True
        try:
            end()
        except BaseException:  # an interrupt
            end()
            raise


def mixed_batch_forward(
    layer: Any, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a layer, each sample through its own adapter, or the base if that is not here."""
    way = layer._way(layer.base_layer)
    known = way is not Way.OWN
    x, *more = inputs_of(layer.base_layer, args, kwargs) if known else [*args, *kwargs.values()]
    if len(x) != len(adapter_names):
        raise AdapterError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    _refuse_merged(layer)
    groups: dict[str, list[int]] = {}
    for sample, name in enumerate(adapter_names):
        groups.setdefault(name if name in layer.shira_weight else BASE, []).append(sample)
    if len(groups) <= 1:
        (name,) = groups or (BASE,)
        return _forward(layer, name, args, kwargs)
    longest = max(len(samples) for name, samples in groups.items() if name != BASE)
    tokens = longest * (x[0].numel() // max(1, x.shape[-1]))
    if way is Way.DIRECT and tokens < layer.whole_product_from and not transforming():
        return _on_top_of_base(layer, x, groups)
    if any(value is not None for value in more):
        raise _cannot_be_split(layer, "takes further arguments")
    return _group_by_group(layer, x, groups)


def _refuse_merged(layer: Any) -> None:
    if layer.merged:
        raise MergeError(
            f"Cannot pass `adapter_names` when there are merged adapters "
            f"({', '.join(layer.merged_adapters)}), please call `unmerge_adapter` first."
        )


def _forward(layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name == BASE:
        return layer._base_forward(*args, **kwargs)
    return layer._adapted_forward([name], args, kwargs)


def _on_top_of_base(layer: Any, x: Tensor, groups: dict[str, list[int]]) -> Tensor:
    """Call the base once for all samples, and put each adapter on top for its own."""
    x = layer._cast_input(x, weight_of(layer.get_base_layer()))
    result: Tensor = layer._base_forward(x)
    result = result.clone() if result.requires_grad else result  # autograd has seen it
    for name, samples in groups.items():
        if name != BASE:
            at = torch.tensor(samples, device=x.device)
            part = layer._on_top(name, x.index_select(0, at), result.index_select(0, at))
            result = result.index_copy_(0, at, part)
    return result


def _group_by_group(layer: Any, x: Tensor, groups: dict[str, list[int]]) -> Tensor:
    """Call the layer for the samples of each adapter apart."""
    parts = []
    for name, samples in groups.items():
        out = _forward(layer, name, (x[samples],), {})
        if not isinstance(out, Tensor) or len(out) != len(samples):
            raise _cannot_be_split(layer, "does not return a tensor with a row for each sample")
        parts.append(out)
    order = [sample for samples in groups.values() for sample in samples]
    return torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]


def _cannot_be_split(layer: Any, why: str) -> AdapterError:
    return AdapterError(
        f"{layer.weight_name}: the forward of {type(layer.get_base_layer()).__name__} {why}, so "
        "it cannot be called for the samples of each adapter apart; give all samples the same "
        "`adapter_names`, or leave the layer out of target_modules"
    )


def _encoder_modules(model: nn.Module) -> Iterable[nn.Module]:
    base = getattr(model, "model", None)
    get = getattr(base, "get_encoder", None)
    encoder = get() if callable(get) else None
    # transformers' default get_encoder may answer with the model itself
    return encoder.modules() if isinstance(encoder, nn.Module) and encoder is not base else ()
