# SPDX-License-Identifier: Apache-2.0
"""The modules that ``target_modules`` matches, checked before anything of the model is touched.

An adapted layer has to act as the merged model would. Where it could not, the target is refused.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from shira.errors import ConfigError, MergeError, TargetError, did_you_mean
from shira.fusing.result import TARGET_FIELDS
from shira.store.header import FLOATS
from shira.store.names import base_module_name, full_shape, is_sharded
from shira.tuner.base_layer import Way, base_of, is_computed, stored_weight, way_to_call, weight_of
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import layer_class_of
from shira.tuner.matching import Matched, kept_out, matched_modules, refuse_other_ties
from shira.tuner.quantized import backend_of


def checked_targets(config: ShiraConfig, model: nn.Module, *, some: bool) -> Matched:
    """Return the modules that a configuration names, if together they can be adapted.

    ``"all-linear"`` is replaced by names. With ``some``, a configuration has to match something.
    """
    _refuse_model(model)
    _name_all_linear(config, model)
    targets = matched_modules(config, model)
    if some and not targets.modules:
        raise _nothing_matched(config, model)
    _warn_of_idle_names(config, model)
    _refuse_other_places(targets.modules.items(), model)
    _refuse_shared_weights(targets.modules.items())
    _check_tied(config, model, targets)
    return targets


def _check_tied(config: ShiraConfig, model: nn.Module, targets: Matched) -> None:
    """Refuse tied weights that cannot be adapted in all the modules that share them."""
    for name, owner in targets.tied.items():
        check_target(name, base_of(model.get_submodule(name)))
        if kept_out(name, config.modules_to_save, config.exclude_modules):
            raise TargetError(
                f"{name!r} shares the weight of {owner!r} (tied weights), which is adapted in all "
                "modules that share it, but exclude_modules or modules_to_save name it; leave it "
                f"out of them, or leave {owner!r} out of what is adapted"
            )
    for name in targets.rows:
        if kept_out(name, config.modules_to_save):
            raise ConfigError(
                f"{name!r} is trained whole (modules_to_save), so trainable_token_indices has "
                "nothing to add; leave it out of one of the two"
            )
    refuse_other_ties(model, targets)


def _name_all_linear(config: ShiraConfig, model: nn.Module) -> None:
    """Put the names in the place of ``"all-linear"``, and warn of what is no module to be named."""
    targets = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if not isinstance(targets, str) or targets == config.target_modules:
        return
    named = dict(model.named_modules())
    adapted = sum(
        math.prod(full_shape(weight_of(base_of(named[name]))))
        for name in config.target_modules or ()
        if layer_class_of(base_of(named[name]))
    )
    left_out: Counter[str] = Counter()
    for path, module in named.items():
        others = nn.Bilinear, ParametrizationList, BaseTunerLayer
        if layer_class_of(module) or isinstance(module, others):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            shape = full_shape(parameter)
            # the weights of many experts are several matrices in one, or these flattened
            flat = "expert" in type(module).__name__.lower() and "bias" not in name
            if min(shape, default=0) > 1 and (len(shape) == 3 or (len(shape) == 2 and flat)):
                left_out[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += math.prod(shape)
    if left_out:
        share = left_out.total() / (adapted + left_out.total())
        warnings.warn(
            f"target_modules='all-linear' leaves out {', '.join(sorted(left_out))}: {share:.0%} of "
            "the model's linear weights. They are parameters with several matrices in each, as the "
            "routed experts of a mixture, and SHiRA adapts modules; they stay as they are",
            stacklevel=2,
        )


def _warn_of_idle_names(config: ShiraConfig, model: nn.Module) -> None:
    """Warn of listed targets that match no module, and of ``modules_to_save`` if none does."""
    names = _known_names(model)
    targets = () if isinstance(config.target_modules, str) else config.target_modules or ()
    idle = [
        ("target_modules", target)
        for target in sorted(targets)
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    whole = config.modules_to_save or []
    # PEFT itself adds several names for a head, of which a model has one.
    if not any(name.endswith(tuple(whole)) for name in names):
        idle += [("modules_to_save", name) for name in whole]
    for field, target in idle:
        warnings.warn(
            f"{field}: {target!r} matches no module of the model.{did_you_mean(target, names)}",
            stacklevel=2,
        )


def name_exactly(config: Any, model: nn.Module, modules: set[str]) -> None:
    """Make a configuration name exactly these modules: as it does, by name, or by an expression."""
    if config.target_modules and _names_exactly(config, model, modules):
        return
    for field in TARGET_FIELDS:
        setattr(config, field, None)
    config.target_modules = set(modules)
    if not _names_exactly(config, model, modules):  # one name is the end of another
        config.target_modules = "|".join(re.escape(name) for name in sorted(modules))


def _names_exactly(config: Any, model: nn.Module, modules: set[str]) -> bool:
    matched = matched_modules(config, model).modules
    inside = tuple(f"{name}." for name, m in matched.items() if isinstance(m, ShiraLayer))
    return {base_module_name(n) for n in matched if not n.startswith(inside)} == modules


def _nothing_matched(config: ShiraConfig, model: nn.Module) -> TargetError:
    targets, names = config.target_modules, _known_names(model)
    wanted = re.findall(r"\w+", targets) if isinstance(targets, str) else sorted(targets or ())
    hints = {did_you_mean(word, names) for word in wanted}
    besides = "".join(
        f", with {field}={value!r}"
        for field in (*TARGET_FIELDS[1:], "modules_to_save")
        if (value := getattr(config, field)) is not None
    )
    return TargetError(
        f"Target modules {targets!r} not found in the base model{besides}. Please check the target "
        f"modules and try again.{''.join(sorted(hints))}"
    )


def _known_names(model: nn.Module) -> set[str]:
    """Return the names of modules, and the last parts of these that are words and not numbers."""
    names = {name for name, _ in model.named_modules() if name}
    return names | {tail for name in names if not (tail := name.rpartition(".")[2]).isdigit()}


def check_target(name: str, target: nn.Module) -> None:
    """Check that an adapted layer can stand in for a module, a base layer or an adapted one."""
    base_layer = base_of(target)
    kind, layer_class = type(base_layer).__name__, layer_class_of(base_layer)
    if layer_class is None:
        raise TargetError(
            f"Target module {name} ({kind}) is not supported. SHiRA adapts torch.nn.Linear, "
            "transformers' Conv1D, torch.nn.Conv1d to Conv3d, torch.nn.ConvTranspose1d to "
            "ConvTranspose3d and torch.nn.Embedding"
        )
    if isinstance(target, BaseTunerLayer) and not isinstance(target, ShiraLayer):
        why = (
            f"SHiRA does not support nested base layers: {type(target).__name__} is itself an "
            "adapter's layer; apply SHiRA first"
        )
    elif getattr(base_layer, "max_norm", None) is not None:
        why = (
            "an embedding with max_norm rewrites its own rows while it looks them up, so its "
            "weight cannot be kept as it is; set max_norm=None"
        )
    elif backend_of(base_layer) is not None:
        return
    elif method := _other_way_in(base_layer):
        why = f"{kind} computes in {method!r} too, which an adapted layer does not stand in for"
    elif (dtype := weight_of(base_layer).dtype) not in FLOATS.values():
        why = (
            f"its weight is {dtype}; SHiRA adapts weights in float32, bfloat16, float16 and "
            "float64, and those packed by a quantization that PEFT knows"
        )
    elif is_computed(base_layer) and way_to_call(base_layer, layer_class.known_forwards) is Way.OWN:
        why = (
            f"its weight is computed (weight_norm, pruning or the like) and its class {kind} has a "
            "forward of its own, which cannot be given another weight; remove the parametrization"
        )
    else:
        return
    raise TargetError(f"{name}: {why}, or leave it out: exclude_modules=[{name!r}]")


def _other_way_in(layer: nn.Module) -> str | None:
    """Return a further method of a layer that computes, as the positions of ProphetNet have.

    The adapted layer stands in for ``forward``; who calls the other one would get the base.
    """
    for kind in type(layer).__mro__:
        for method, function in () if kind.__module__.startswith("torch.") else vars(kind).items():
            code = getattr(function, "__code__", None)
            if method != "forward" and code is not None and "forward" in code.co_names:
                return method
    return None


def _refuse_model(model: nn.Module) -> None:
    """Refuse a model that takes PEFT's names, or divides its own weights for eval mode (RWKV)."""
    for name, part in model.named_modules():
        if "base_layer" in part._modules and not isinstance(part, BaseTunerLayer):
            raise TargetError(
                f"the model's {name or 'root'} ({type(part).__name__}) has a part called "
                "'base_layer', the name by which PEFT knows an adapted layer; rename it, or adapt "
                "another part of the model"
            )
        config: Any = getattr(part, "config", None)
        if hasattr(part, "layers_are_rescaled") and config.rescale_every:
            raise TargetError(
                f"{name or type(part).__name__} rewrites its weights between training and eval "
                f"mode (rescale_every={config.rescale_every}), which an adapter cannot follow; set "
                "model.config.rescale_every = 0 first"
            )


def _refuse_other_places(targets: Iterable[tuple[str, nn.Module]], model: nn.Module) -> None:
    """Refuse a target that is called from where an adapted layer cannot be put in its place.

    Such as a part of two modules, or of a list that a module keeps beside its parts: what is put
    in by name is then not what runs.
    """
    names = {id(module): name for name, module in targets}
    first: dict[int, tuple[int, str]] = {}
    for owner_name, owner in model.named_modules():
        if isinstance(owner, BaseTunerLayer):
            continue
        others = [
            (key, part)
            for key, part in owner._modules.items()
            if first.setdefault(id(part), (id(owner), key)) != (id(owner), key)
        ]
        for key, value in vars(owner).items():
            if key not in _OF_TORCH:
                others += [(key, part) for part in _modules_in(value)]
        for key, part in others:
            if name := names.get(id(part)):
                raise TargetError(
                    f"{name!r} is also held by {owner_name or 'the model'} "
                    f"({type(owner).__name__}) as {key!r}: what is called from there would not be "
                    "the adapted layer; leave it out of the targets, for instance by "
                    f"exclude_modules=[{name!r}]"
                )


_OF_TORCH = frozenset(vars(nn.Module()))


def _modules_in(value: Any) -> Iterable[nn.Module]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        value = [value]
    return [one for one in value if isinstance(one, nn.Module)]


def _refuse_shared_weights(targets: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse two targets with one weight between them: each would have its own entries in it."""
    seen: dict[int, str] = {}
    for name, module in targets:
        place = _place_of(stored_weight(module)) if layer_class_of(base_of(module)) else None
        if place is not None and seen.setdefault(place, name) != name:
            raise TargetError(
                f"{seen[place]!r} and {name!r} share one weight (tied weights), so two adapters on "
                "it would contradict each other once merged; set ensure_weight_tying=True to have "
                f"one adapter in both, or leave one out, for instance by exclude_modules=[{name!r}]"
            )


def refuse_merging_shared_weights(model: nn.Module, layers: Collection[ShiraLayer]) -> None:
    """Refuse to merge into the weight of a layer that a module which is not adapted has too."""
    owners = {_place_of(stored_weight(layer)): layer for layer in layers}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            place = _place_of(tensor)
            if place is not None and place in owners:
                raise MergeError(
                    f"{owners[place].weight_name.removesuffix('.weight')!r} shares its weight with "
                    f"{name!r} (tied weights), which is not adapted: merging would change both. "
                    "Train with ensure_weight_tying=True, untie them first (load the model with "
                    "tie_word_embeddings=False), or keep the adapter unmerged"
                )


def _place_of(tensor: Tensor | None) -> int | None:
    """Return what tells a tensor's memory from that of others; None if it has none here."""
    if tensor is None or tensor.is_meta or is_sharded(tensor) or not tensor.numel():
        return None
    # A packed tensor subclass (torchao) has no memory of its own to be known by.
    return tensor.data_ptr() or id(tensor)
