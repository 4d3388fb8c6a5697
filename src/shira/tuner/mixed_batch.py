# SPDX-License-Identifier: Apache-2.0
"""``adapter_names=``: an adapter for each sample of a batch.

The model hands the names to its layers, grouped by adapter once for all of them. A layer calls its
base for the whole batch and puts the adapters on top, or where that is dearer or cannot
be, calls its forward for each group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from shira.errors import AdapterError, MergeError, UnknownAdapterError, did_you_mean
from shira.ops import DeltaGroups
from shira.ops.plain import transforming
from shira.ops.product import runs_eagerly
from shira.tuner.base_layer import Way, inputs_of, weight_of

BASE = "__base__"
"""In ``adapter_names``: this sample goes through the base model."""
_KEPT = 4  # rows of a batch that are kept, by the adapters that a layer has and by tokens


class Rows(NamedTuple):
    """Rows of a batch, ``(samples * tokens, features)``, by the adapter that they want."""

    order: Tensor
    """int64: those of the first adapter, of the second, and so on."""
    counts: list[int]
    """The number that each has."""
    ready: dict[Any, Ready]
    """Of their `Samples`."""


class Ready(NamedTuple):
    """Findings of a layer in a forward pass, kept for the next of the same names.

    Between two products of a model nothing of a layer stays in the CPU's caches, and to find this
    again takes a quarter of the time of adding the entries. What depends on the layer is therefore
    asked before a forward pass, for all layers in a row (`Samples.look_again`), and what depends
    on the input in the layer (`takes`).
    """

    shape: torch.Size
    """Of the input."""
    dtype: torch.dtype
    """Of the input and the weight."""
    adapters: list[str]
    """Those of the samples' that the layer has."""
    rows: Rows
    """Theirs."""
    groups: DeltaGroups
    """The adapters' entries and values, as they lie."""

    def takes(self, x: Tensor) -> bool:
        """Return whether this is so for an input too."""
        if x.shape != self.shape or x.dtype != self.dtype or not runs_eagerly(x):
            return False
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            return False
        return self.groups.in_place()


class Samples(tuple[str, ...]):
    """The adapter's name of each sample, grouped once for all layers of a forward pass.

    The model keeps the latest for the next forward pass of the same names, as in generation.
    """

    @classmethod
    def of(cls, model: Any, names: Iterable[str]) -> Samples:
        """Return those of the model's last forward pass, if they are the same; else new ones."""
        samples = cls(names)
        for latest in model._latest_samples:
            if latest == samples:
                return latest  # type: ignore[no-any-return]
        # two, for an encoder has others than the beams of its decoder
        model._latest_samples = (samples, *model._latest_samples[:1])
        return samples

    def __reduce__(self) -> tuple[Any, ...]:
        return Samples, (tuple(self),)  # a copy of the model has other layers

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Return the samples of each name, in the order of their first ones."""
        found: dict[str, list[int]] = {}
        for sample, name in enumerate(self):
            found.setdefault(name, []).append(sample)
        return found

    def rows(self, adapters: Sequence[str], tokens: int, device: torch.device) -> Rows:
        """Return where some adapters' tokens are in a batch of so many for each sample."""
        key = (*adapters, tokens, device)
        if key in self._rows:
            return self._rows[key]
        groups = [self.groups[name] for name in adapters]
        with torch.inference_mode(False):  # they may be for a later call with gradients
            at = torch.tensor([sample for group in groups for sample in group], device=device)
            order = (at.unsqueeze(1) * tokens + torch.arange(tokens, device=device)).view(-1)
        rows = Rows(order, [len(group) * tokens for group in groups], self.ready)
        if runs_eagerly(order):
            if len(self._rows) == _KEPT:
                self._rows.clear()
            self._rows[key] = rows
        return rows

    @cached_property
    def ready(self) -> dict[Any, Ready]:
        """Return what layers found in the last forward pass, by layer."""
        return {}

    def look_again(self) -> None:
        """Forget what layers found that is so no longer."""
        for layer, ready in [*self.ready.items()]:
            adapters = [name for name in self.groups if name in layer.scaling]
            if adapters != ready.adapters or not layer._is_as_before(ready):
                self.ready.pop(layer, None)  # another thread may have seen it, too

    @cached_property
    def _rows(self) -> dict[Any, Rows]:
        return {}


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
    modules = list(model.modules())
    layers: list[Any] = [m for m in modules if isinstance(m, model.tuner_layer_cls)]
    known = {BASE}.union(*(layer.scaling for layer in layers))
    for name in adapter_names:
        if name not in known:
            raise UnknownAdapterError(
                f"Trying to infer with non-existing adapter(s): {name}."
                f"{did_you_mean(name, known)} Known are {', '.join(sorted(known - {BASE}))}, and "
                f"{BASE!r} for the base model."
            )
    once = Samples.of(model, adapter_names)
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    names = (name for name in once for _ in range(beams))
    repeated = Samples.of(model, names) if beams > 1 else once
    in_encoder = set(_encoder_modules(model))
    once.look_again()
    if repeated is not once:
        repeated.look_again()
    for layer in layers:
        if not layer.disable_adapters:
            _refuse_merged(layer)
    wrappers = [m for m in modules if isinstance(m, AuxiliaryTrainingWrapper)]
    handles: list[Any] = []
    outer = [layer._samples for layer in layers]  # those of a forward that this one lies within
    over = False  # then a hook that an interrupt leaves behind does nothing

    def samples_of(module: nn.Module) -> Samples:
        return once if module in in_encoder else repeated

    def hand(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return None if over else (args, {**kwargs, "adapter_names": samples_of(module)})

    def end() -> None:
        for layer, samples in zip(layers, outer, strict=True):
            layer._samples = samples
        for handle in handles:
            handle.remove()

    try:
        for module in wrappers:
            handles.append(module.register_forward_pre_hook(hand, with_kwargs=True))
        for layer in layers:
            layer._samples = samples_of(layer)
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
    handed: Samples | None = layer._samples  # by the model, which has looked at what is ready
    if handed is adapter_names and len(args) == 1 and not kwargs:
        ready = handed.ready.get(layer)
        if ready is not None and ready.takes(args[0]):
            return ready.groups.add_again(layer._base_forward(*args), args[0], ready.rows.order)
    base = layer._modules["base_layer"]
    way = layer._way(base)
    inputs: Sequence[Any] = args
    if kwargs or len(args) > 1:
        own = way is Way.OWN
        inputs = [*args, *kwargs.values()] if own else inputs_of(base, args, kwargs)
    x, *more = inputs
    if len(x) != len(adapter_names):
        raise AdapterError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    _refuse_merged(layer)
    samples = adapter_names if isinstance(adapter_names, Samples) else Samples(adapter_names)
    groups, here = samples.groups, layer.scaling
    adapters = [name for name in groups if name in here]
    if not adapters:
        return _forward(layer, BASE, args, kwargs)
    if len(groups) == 1:
        return _forward(layer, adapters[0], args, kwargs)
    if way is Way.DIRECT and not transforming():
        longest = max([len(groups[name]) for name in adapters])
        tokens = longest * (x.numel() // max(1, len(x) * x.shape[-1]))
        if tokens < layer.whole_product_from:
            return _on_top_of_base(layer, x, samples, adapters)
    if any(value is not None for value in more):
        raise _cannot_be_split(layer, "takes further arguments")
    return _group_by_group(layer, x, samples, adapters)


def _refuse_merged(layer: Any) -> None:
    if layer.merged_adapters:
        raise MergeError(
            f"Cannot pass `adapter_names` when there are merged adapters "
            f"({', '.join(layer.merged_adapters)}), please call `unmerge_adapter` first."
        )


def _forward(layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name == BASE:
        return layer._base_forward(*args, **kwargs)
    return layer._adapted_forward([name], args, kwargs)


def _on_top_of_base(layer: Any, x: Tensor, samples: Samples, adapters: list[str]) -> Tensor:
    """Call the base once for all samples, and put each adapter on top for its own."""
    x = layer._cast_input(x, weight_of(layer))
    result: Tensor = layer._base_forward(x)
    result = result.clone() if result.requires_grad else result  # autograd has seen it
    tokens, rest = divmod(math.prod(result.shape[:-1]), len(samples))
    if rest:
        raise _cannot_be_split(layer, "was given an input without a row for each sample")
    rows = samples.rows(adapters, tokens, x.device)
    return layer._on_top(adapters, rows, x, result)  # type: ignore[no-any-return]


def _group_by_group(layer: Any, x: Tensor, samples: Samples, adapters: list[str]) -> Tensor:
    """Call the layer for the samples of each adapter apart.

    Samples that are long enough for a product of their own are not moved together: each goes with
    its neighbours of the same adapter, as it lies.
    """
    names = [name if name in adapters else BASE for name in samples]
    runs = groupby(range(len(names)), key=names.__getitem__)
    parts = [(name, list(run)) for name, run in runs]
    tokens = x.numel() // max(1, len(x) * x.shape[-1])
    if len(parts) > len(set(names)) and not 0 < layer.whole_product_from <= tokens:
        parts = [
            (name, [at for at, other in enumerate(names) if other == name])
            for name in dict.fromkeys(names)
        ]
    found, order = [], []
    for name, group in parts:
        together = group[-1] - group[0] + 1 == len(group)
        part = x[group[0] : group[-1] + 1] if together else x[group]
        out = _forward(layer, name, (part,), {})
        if not isinstance(out, Tensor) or len(out) != len(group):
            raise _cannot_be_split(layer, "does not return a tensor with a row for each sample")
        found.append(out)
        order += group
    result = torch.cat(found)
    in_order = order == sorted(order)
    return result if in_order else result[torch.tensor(order).argsort().to(x.device)]


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
