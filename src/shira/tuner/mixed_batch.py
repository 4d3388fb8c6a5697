# SPDX-License-Identifier: Apache-2.0
"""``adapter_names=``: an adapter for each sample of a batch.

The model hands the names to its layers by hooks; a layer groups the samples by adapter, and unless
its type can compute all groups together, calls its forward for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from shira.errors import AdapterError, UnknownAdapterError, did_you_mean

BASE = "__base__"
"""In ``adapter_names``: this sample goes through the base model."""


@contextmanager
def adapter_names_in_effect(
    model: BaseTuner, adapter_names: Sequence[str] | None, num_beams: int | None
) -> Iterator[None]:
    """Hand every adapted layer ``adapter_names`` with its input, while the context lasts.

    Args:
        model: The tuner.
        adapter_names: One name for each sample; ``"__base__"`` for none. ``None``: do nothing.
        num_beams: In a beam search each sample stands so many times; in the encoder once.

    Raises:
        AdapterError: If the model is in training mode.
        UnknownAdapterError: If a name is not that of an adapter.
        MergeError: If an adapter is merged, also into a layer that is only read.
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, model.tuner_layer_cls)]
    _check_known(adapter_names, {name for layer in layers for name in layer.shira_weight})
    once = list(adapter_names)
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in once for _ in range(beams)]
    encoder = _encoder_of(model)
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    for layer in layers:
        if not layer.disable_adapters:
            layer.refuse_samples_if_merged()
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


def samples_by_adapter(
    adapter_names: Sequence[str], known: Collection[str], samples: int
) -> dict[str, list[int]]:
    """Group the samples of a batch by adapter.

    Args:
        adapter_names: One for each sample.
        known: The adapters of the layer; any other name is the base.
        samples: How many there are.

    Raises:
        AdapterError: If there are more or fewer names.
    """
    if samples != len(adapter_names):
        raise AdapterError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {samples} respectively."
        )
    groups: dict[str, list[int]] = {}
    for sample, name in enumerate(adapter_names):
        groups.setdefault(name if name in known else BASE, []).append(sample)
    return groups


def on_top_of_base(
    groups: dict[str, list[int]],
    x: Tensor,
    base_forward: Callable[[Tensor], Tensor],
    on_top: Callable[[str, Tensor, Tensor], Tensor],
) -> Tensor:
    """Call the base once for all samples, and put each adapter on top for its own.

    Args:
        groups: From `samples_by_adapter`.
        x: ``(samples, ...)``.
        base_forward: Of the layer.
        on_top: Given an adapter's name, its samples of ``x`` and the base's results for them.

    Returns:
        ``(samples, ...)``.
    """
    result = base_forward(x)
    result = result.clone() if result.requires_grad else result  # autograd has seen it
    for name in [name for name in groups if name != BASE]:
        at = torch.tensor(groups[name], device=x.device)
        part = on_top(name, x.index_select(0, at), result.index_select(0, at))
        result = result.index_copy_(0, at, part)
    return result


def group_by_group(
    groups: dict[str, list[int]],
    arguments: Sequence[Any],
    forward: Callable[[str, Tensor], Any],
    what: str,
) -> Tensor:
    """Call a layer's forward for the samples of each adapter apart.

    Args:
        groups: From `samples_by_adapter`, not empty.
        arguments: Of the layer: ``(samples, ...)``, and no others but None.
        forward: Given an adapter's name and its samples.
        what: The layer, for the error.

    Returns:
        ``(samples, ...)``.

    Raises:
        AdapterError: If there are other arguments, or a result that is not one for each sample.
    """
    x, *more = arguments
    why = "takes further arguments" if any(value is not None for value in more) else ""
    result = None
    for name, samples in () if why else groups.items():
        out = forward(name, x[samples])
        if not isinstance(out, Tensor) or len(out) != len(samples):
            why = "does not return a tensor with a row for each sample"
            break
        if result is None:
            result = out.new_empty((len(x), *out.shape[1:]))
        result[samples] = out
    if why or result is None:
        raise AdapterError(
            f"{what} {why}, so it cannot be called for the samples of each adapter apart; give all "
            "samples the same `adapter_names`, or leave the layer out of target_modules"
        )
    return result


def _check_known(adapter_names: Sequence[str], known: Collection[str]) -> None:
    for name in adapter_names:
        if name != BASE and name not in known:
            raise UnknownAdapterError(
                f"Trying to infer with non-existing adapter(s): {name}."
                f"{did_you_mean(name, known)} Known are {', '.join(sorted(known))}, and "
                f"{BASE!r} for the base model."
            )


def _encoder_of(model: nn.Module) -> nn.Module | None:
    base = getattr(model, "model", None)
    get = getattr(base, "get_encoder", None)
    encoder = get() if callable(get) else None
    # transformers' default get_encoder may answer with the model itself
    return encoder if isinstance(encoder, nn.Module) and encoder is not base else None
