# SPDX-License-Identifier: Apache-2.0
"""The layer under an adapted one: reading its weight, wherever that is, and calling it.

Accelerate's offloading leaves a weight on the meta device, ZeRO-3 and FSDP2 keep it in parts, a
parametrization computes it at each use. A merged adapter and an active `shira.Switch` have
overwritten some of its entries and keep the originals: masks, fingerprints and checks of the base
see those (`base_values`, `pristine`), not an adapter.

An adapted layer multiplies with the base layer's weight itself, or has the base layer's forward do
so with another weight. Users, Accelerate and FSDP hang hooks on the base layer and expect them to
fire, with the base layer as the module.
"""

from __future__ import annotations

import copy
import enum
import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from shira.errors import TargetError
from shira.ops.memory import keep_over_fork, memory_of, offsets_of, settle
from shira.ops.patch import Overwritten, restored
from shira.store.names import gathered, is_partitioned, is_sharded, whole
from shira.support import Support
from shira.tuner.quantized import backend_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MACHINERY = ("torch.distributed.", "deepspeed.")

_LOOK_UP = nn.Module.__getattr__

_swapping = threading.RLock()
keep_over_fork(_swapping)


# ------------------------------------------------------------------------------------------ reading


def members(module: nn.Module, *names: str) -> list[Any]:
    """Return ``[getattr(module, name), ...]``: fast attribute lookup for hot paths.

    ``module.weight`` is first looked for, in vain, as an ordinary attribute and then found by
    ``nn.Module.__getattr__``: a microsecond a name, which a layer's call paid twenty times over.
    """
    parameters, found = module._parameters, []
    for name in names:  # FSDP1 and parametrizations put something else in a parameter's place
        found.append(parameters[name] if name in parameters else getattr(module, name))
    return found


class ParameterOf:
    """A parameter of a module where a layer is expected: it is the layer's weight."""

    def __init__(self, module: nn.Module, parameter_name: str) -> None:
        self.around = module
        """The module, or what adapts it already."""
        self._module, self.parameter_name = base_of(module), parameter_name

    def get_base_layer(self) -> Any:
        """Return the module."""
        return self._module


Layer: TypeAlias = nn.Module | ParameterOf
"""A base layer, an adapted one, or what stands for a layer."""


def base_of(layer: Any) -> Any:
    """Return the layer that is adapted, under whatever adapts it already."""
    kind = type(layer)
    if getattr(kind, "__getattr__", None) is _LOOK_UP and not hasattr(kind, "get_base_layer"):
        return layer  # a module as torch's own are; to look in it in vain takes a microsecond
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def weight_of(layer: Layer) -> Tensor:
    """Return the base layer's weight; of a quantized layer the packed one."""
    base, name = base_of(layer), _weight_in(layer)
    weight: Tensor | None = base._parameters.get(name)
    if weight is None:  # computed from others, or GPTQ's
        with at_rest([base]):
            return getattr(base, name)  # type: ignore[no-any-return]
    return weight


def stored_weight(layer: Layer) -> Any:
    """Return the base layer's weight as it is stored: packed, in parts, or None (GPTQ)."""
    base, name = base_of(layer), _weight_in(layer)
    if name in base._parameters and name not in base.__dict__:
        return base._parameters[name]
    return None if is_computed(layer) else getattr(base, name, None)


def is_computed(layer: Layer) -> bool:
    """Return whether the base layer's weight is made from other parameters at each use.

    By ``torch.nn.utils.parametrize`` (weight_norm, spectral_norm, orthogonal), or by a hook before
    the forward (the older weight_norm and spectral_norm, pruning).
    """
    base, name = base_of(layer), _weight_in(layer)
    parts = base._parameters
    if name in parts:
        return False
    return is_parametrized(base, name) or any(n.startswith(f"{name}_") for n in parts)


def _weight_in(layer: Any) -> str:
    """Return the name of the weight in the base layer."""
    known = "parameter_name" in layer.__dict__ or hasattr(type(layer), "parameter_name")
    return layer.parameter_name if known else "weight"


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """Make a module's own parameters readable for a while, wherever they are kept."""
    parameters = list(module.parameters(recurse=False))
    away = any(parameter.is_meta for parameter in parameters)
    here = align_module_device(module) if away else nullcontext()
    with here, gathered(parameters), at_rest([module]):
        yield


@contextmanager
def at_rest(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the reading of a computed weight from changing anything.

    spectral_norm improves its estimate, a buffer, at each reading in training mode.
    """
    computing = filter(None, (m._modules.get("parametrizations") for m in modules))
    training = [part for some in computing for part in some.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def base_values(layer: Layer, support: Support, gather: bool = False) -> Tensor | None:
    """Return the base's values at a support, ``(k,)``, also if the layer is adapted.

    None where they are not there as numbers: on the meta device, or packed by quantization. What
    Accelerate has offloaded or ZeRO-3 has partitioned is fetched; ``gather`` makes a weight whole
    that FSDP2 has sharded, which is a collective call.
    """
    base = base_of(layer)
    if backend_of(base) is not None:
        return None
    with readable(base):
        weight: Tensor = getattr(base, _weight_in(layer))
        settle(weight)
        overwritten = _overwritten(layer, weight)
        return values_at(whole(weight) if gather else weight, support, *overwritten)


def pristine(layer: Layer) -> nn.Module:
    """Return the base layer, to look at; if adapters are in it, a copy with the base's weight.

    For another parameter of a module a layer that has just that one, as its ``weight``.
    """
    base: nn.Module = base_of(layer)
    with readable(base):
        weight = stored_weight(layer)
        settle(weight)
        overwritten = _overwritten(layer, weight)
        if not overwritten and _weight_in(layer) == "weight":
            return base
        if not overwritten:
            return _holding(weight.detach())
        copied = weight.detach().clone()
        for record in overwritten:
            memory_of(copied).index_copy_(0, record.offsets.long(), record.originals)
    if _weight_in(layer) != "weight":
        return _holding(copied)
    stand_in = copy.copy(base)
    stand_in._parameters = {**base._parameters, "weight": nn.Parameter(copied, requires_grad=False)}
    return stand_in


def _holding(weight: Tensor) -> nn.Module:
    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    return holder


def with_originals(state_dict: dict[str, Any], key: str, layer: nn.Module) -> None:
    """Put the base's values into a layer's weight in a state dict that was taken while merged.

    The layer has the same adapters merged as then. No tensor of the state dict is written to.
    """
    undo, given = getattr(layer, "_undo", None), state_dict.get(key)
    if isinstance(given, Tensor) and given.data_ptr() == stored_weight(layer).data_ptr():
        state_dict[key] = weight_of(pristine(layer)).detach()
        return
    if undo is None or not isinstance(given, Tensor):
        return
    support = Support(undo.plan.weight_shape, undo.plan.flat())
    found, merged = (values_at(weight, support) for weight in (given, stored_weight(layer)))
    if found is None or merged is None or not torch.equal(found.to(merged), merged):
        return
    copied = given.detach().clone(memory_format=torch.contiguous_format)
    flat = support.indices.long().to(copied.device)
    state_dict[key] = copied
    copied.view(-1).index_copy_(0, flat, undo.originals.to(copied.device, copied.dtype))


def values_at(weight: Tensor, support: Support, *overwritten: Overwritten) -> Tensor | None:
    """Return ``(k,)`` entries of a weight, or None if it does not hold them all as numbers.

    They are what they are now, but for what was ``overwritten``: see `shira.ops.patch.restored`.
    """
    if (
        weight.is_meta
        or is_sharded(weight)
        or not weight.is_floating_point()
        or weight.shape != torch.Size(support.shape)
    ):
        return None
    offsets = offsets_of(support.indices.to(weight.device), weight.shape, weight.stride())
    return restored(memory_of(weight.detach()).index_select(0, offsets), offsets, *overwritten)


def _overwritten(layer: Layer, weight: Tensor) -> list[Overwritten]:
    """Return what adapters have overwritten in a weight, the latest first."""
    undo = getattr(layer, "_undo", None)
    patch = getattr(weight, "shira_patch", None)  # of `shira.Switch`
    records = [] if undo is None else [undo.record(weight)]
    if patch is not None:
        offsets, originals = patch.offsets.to(weight.device), patch.originals
        records.append(Overwritten(offsets, originals.to(weight.device, weight.dtype)))
    return [record for record in records if record.nnz]


def gather_for_call(layer: nn.Module, parameter: Tensor) -> None:
    """Gather a parameter of ZeRO-3 for the call of a layer that is under way, and for later ones.

    DeepSpeed gathers the parameters of a module that is called, and does this itself where it sees
    a module use another's. An adapter's values are in a dictionary, which is never called.
    """
    if is_partitioned(parameter) and is_sharded(parameter):
        import deepspeed

        deepspeed.zero.register_external_parameter(layer, parameter)
        parameter.all_gather()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------ calling


class Way(enum.Enum):
    """The ways in which an adapted layer gets the result of its base layer's call."""

    DIRECT = enum.auto()
    """By a product of our own."""
    HOOKED = enum.auto()
    """The same, between the base layer's hooks."""
    OWN = enum.auto()
    """By the base layer's own forward, with another weight."""


def way_to_call(module: nn.Module, known: Collection[Callable[..., Any]] | None) -> Way:
    """Return how to call a base layer, given the forwards that have a product (None: all have)."""
    own = module.__dict__
    if known is not None:
        if "forward" not in own:
            if type(module).forward not in known:
                return Way.OWN
        # Set on the module itself, it is another one, unless Accelerate wrapped it.
        elif "_hf_hook" not in own or getattr(own["_old_forward"], "__func__", None) not in known:
            return Way.OWN
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in own
    )
    return Way.HOOKED if hooked else Way.DIRECT


def has_hooks_of_users(module: nn.Module) -> bool:
    """Return whether the module has hooks, beside those that gather weights (FSDP2, DeepSpeed)."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_MACHINERY)
        for name in _HOOKS
        for hook in getattr(module, name).values()
    )


def call_with_hooks(
    module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a module, hooks and all, with ``forward`` in the place of its own.

    Accelerate wraps a module's forward and keeps the original as ``_old_forward``; its wrapper
    then counts among the hooks.
    """
    with _swapping:
        own, place = module.__dict__, _place_of_forward(module)
        return _with_entry(own, place, forward, module, *args, **kwargs)


def call_with_weights(
    module: nn.Module, weights: Mapping[str, Callable[[], Tensor]], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a module, hooks and all, with other parameters, made once the hooks before have run."""
    with _swapping:
        forward = getattr(module, _place_of_forward(module))

        def with_weights(*args: Any, **kwargs: Any) -> Any:
            call = forward
            for name, weight in weights.items():
                if is_parametrized(module, name):  # what is put there would not be read
                    raise TargetError(
                        f"{name!r} of {type(module).__name__} has been parametrized since it was "
                        "adapted, so it cannot be given another value; remove the parametrization"
                    )
                # FSDP1 has a plain attribute before the parameter, or in its place.
                plain = name in module.__dict__ or name not in module._parameters
                entries = module.__dict__ if plain else module._parameters
                call = partial(_with_entry, entries, name, weight(), call)
            return call(*args, **kwargs)

        if way_to_call(module, None) is Way.DIRECT:
            return with_weights(*args, **kwargs)
        return call_with_hooks(module, with_weights, *args, **kwargs)


def inputs_of(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the inputs of a layer's forward in its order, however they are passed."""
    return [*inspect.signature(type(base).forward).bind(base, *args, **kwargs).arguments.values()][
        1:
    ]


def _place_of_forward(module: nn.Module) -> str:
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def _with_entry(
    entries: dict[str, Any], name: str, value: Any, call: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """Return ``call(*args, **kwargs)`` while ``entries[name]`` is ``value``, and put that back."""
    put_back = partial(entries.pop, name, None)
    if name in entries:
        put_back = partial(entries.__setitem__, name, entries[name])
    try:
        entries[name] = value
        result = call(*args, **kwargs)
    except BaseException:
        put_back()  # one call into C, so no interrupt leaves half of it
        raise
    put_back()
    return result
