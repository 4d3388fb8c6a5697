# SPDX-License-Identifier: Apache-2.0
"""``adapter_names=``: an adapter for each sample of a batch, handed to the layers by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from shira.errors import AdapterError, UnknownAdapterError, did_you_mean
from shira.tuner.layer import BASE, ShiraLayer


@contextmanager
def adapter_names_in_effect(
    model: nn.Module, adapter_names: Sequence[str] | None, num_beams: int | None
) -> Iterator[None]:
    """While the context lasts, every adapted layer gets ``adapter_names`` with its input.

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
    _check_known(model, adapter_names)
    once = list(adapter_names)
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in once for _ in range(beams)]
    encoder = _encoder_of(model)
    in_encoder = set(map(id, encoder.modules())) if encoder is not None else set()
    layers = [module for module in model.modules() if isinstance(module, ShiraLayer)]
    for layer in layers:
        if not layer.disable_adapters:
            layer.refuse_samples_if_merged()
    effect = _Effect()
    handles: list[Any] = []

    def end() -> None:
        for layer in layers:
            layer._samples = None
        for handle in handles:
            handle.remove()

    try:
        for module in model.modules():
            if isinstance(module, (ShiraLayer, AuxiliaryTrainingWrapper)):
                hook = _Handing(once if id(module) in in_encoder else repeated, effect)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for layer in layers:
            layer._samples = once
        yield
    finally:
        effect.over = True  # a hook that an interrupt leaves behind does nothing
        try:
            end()
        except BaseException:  # an interrupt
            end()
            raise


class _Effect:
    over = False


class _Handing:
    def __init__(self, adapter_names: list[str], effect: _Effect) -> None:
        self.adapter_names, self.effect = adapter_names, effect

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.effect.over:
            return None
        return args, {**kwargs, "adapter_names": self.adapter_names}


def _check_known(model: nn.Module, adapter_names: Sequence[str]) -> None:
    known = {
        name
        for module in model.modules()
        if isinstance(module, ShiraLayer)
        for name in module.shira_weight
    }
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
