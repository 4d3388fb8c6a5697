# SPDX-License-Identifier: Apache-2.0
"""The modules and parameters that a configuration matches, checked before the model is touched.

An adapted layer has to act as the merged model would. Where it could not, the target is refused.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from shira.errors import ConfigError, MergeError, TargetError, did_you_mean
from shira.fusing.result import TARGET_FIELDS
from shira.store.header import FLOATS
from shira.store.names import (
    base_module_name,
    full_shape,
    is_parameter,
    is_sharded,
    name_of_layer,
)
from shira.tuner.base_layer import (
    ParameterOf,
    Way,
    base_of,
    is_computed,
    stored_weight,
    way_to_call,
    weight_of,
)
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import layer_class_of
from shira.tuner.matching import Matched, Target, kept_out, matched_modules, refuse_other_ties
from shira.tuner.parameter import ParameterLayer
from shira.tuner.quantized import backend_of


def checked_targets(config: ShiraConfig, model: nn.Module, *, some: bool) -> Matched:
    """Return what a configuration names, if together it can be adapted.

    ``"all-linear"`` is replaced by names. With ``some``, a configuration has to match something.
    """
    named = dict(model.named_modules())
    _refuse_model(named)
    _name_all_linear(config, model)
    matched = matched_modules(config, model)
    targets = matched.targets
    if some and not targets:
        raise _nothing_matched(config, model)
    _warn_of_idle_names(config, model, targets)
    _refuse_two_ways(targets)
    _refuse_other_places(targets, named)
    _refuse_shared_weights(targets)
    _check_tied(config, model, matched)
    _refuse_trained_whole(config, named, targets)
    return matched


def _check_tied(config: ShiraConfig, model: nn.Module, targets: Matched) -> None:
    """Refuse tied weights that cannot be adapted in all the modules that share them."""
    for name, owner in targets.tied.items():
        check_target(Target(name, base_of(model.get_submodule(name))))
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
    """Put the names in the place of ``"all-linear"``, and tell of parameters like linear weights.

    The routed experts of a mixture are adapted too where LoRA adapts them.
    """
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
    experts = set() if config.target_parameters else _routed_experts(config, model)
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}  # adapted, left out
    for path, module in named.items():
        others = nn.Bilinear, ParametrizationList, BaseTunerLayer
        if layer_class_of(module) or isinstance(module, others):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            shape = full_shape(parameter)
            # the weights of many experts are several matrices in one, or these flattened
            flat = "expert" in type(module).__name__.lower() and "bias" not in name
            if min(shape, default=0) > 1 and (len(shape) == 3 or (len(shape) == 2 and flat)):
                name, base = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), base_module_name(name)
                own = base in experts or is_parameter(base, config.target_parameters)
                found[own][name] += math.prod(shape)
    whole = adapted + found[True].total() + found[False].total()
    if experts:
        ends = {name.rpartition(".")[2] for name in experts}
        names = {base_module_name(name) for name, _ in model.named_parameters()}
        alone = {name for name in names if is_parameter(name, ends)} == experts
        config.target_parameters = sorted(ends if alone else experts)
        warnings.warn(
            f"target_modules='all-linear' includes the routed experts, "
            f"{_shares(found[True], whole)}, which LoRA takes for linear layers too; the router "
            "stays as it is. exclude_modules=['experts'] leaves the experts out",
            stacklevel=2,
        )
    if found[False]:
        warnings.warn(
            f"target_modules='all-linear' leaves out {_shares(found[False], whole)}. They are "
            "parameters with several matrices in each, as the routed experts of a mixture, and no "
            "modules; to adapt them, name them in target_parameters",
            stacklevel=2,
        )


def _shares(sizes: Counter[str], whole: int) -> str:
    share = sizes.total() / whole
    return f"{', '.join(sorted(sizes))}: {share:.0%} of the model's linear weights"


def _routed_experts(config: ShiraConfig, model: nn.Module) -> set[str]:
    """Return the names of the experts' parameters that LoRA takes for linear layers.

    As they were before transformers 5 joined them. PEFT has a list of the kinds of model.
    """
    with suppress(ImportError):  # transformers' own list, which PEFT's is made of, has moved
        from peft.utils import transformers_weight_conversion as known

        kind = str(BaseTuner.get_model_config(model).get("model_type"))
        kinds: Any = vars(known)["_MODEL_TO_CONVERSION_PATTERN"]
        ends = known._MOE_TARGET_MODULE_MAPPING.get(kinds.get(kind, kind), {}).values()
        return {
            base_module_name(name)
            for name, parameter in model.named_parameters()
            if name.endswith(tuple(f".{end}" for end in ends)) and len(full_shape(parameter)) == 3
            if not kept_out(
                base_module_name(name.rpartition(".")[0]),
                *(config.modules_to_save, config.exclude_modules),
            )
        }
    return set()


def _warn_of_idle_names(config: ShiraConfig, model: nn.Module, matched: Iterable[Target]) -> None:
    """Warn of listed targets that match no module, and of ``modules_to_save`` if none does.

    PEFT itself warns of a ``rank_pattern``, but looks for its matches among the modules alone.
    """
    names = _known_names(model)
    targets = () if isinstance(config.target_modules, str) else config.target_modules or ()
    idle = [
        ("target_modules", target)
        for target in sorted(targets)
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    idle += [
        ("rank_pattern", pattern)
        for pattern in (config.rank_pattern if config.target_parameters else ())
        if not any(config.has_rank(target.name, pattern) for target in matched)
    ]
    if config.target_parameters:
        known = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        parameters = [base_module_name(name) for name in known]
        idle += [
            ("target_parameters", target)
            for target in config.target_parameters
            if not any(is_parameter(name, [target]) for name in parameters)
        ]
    whole = config.modules_to_save or []
    # PEFT itself adds several names for a head, of which a model has one.
    if not any(name.endswith(tuple(whole)) for name in names):
        idle += [("modules_to_save", name) for name in whole]
    for field, target in idle:
        kind = "parameter" if field == "target_parameters" else "module"
        near = did_you_mean(target, names if kind == "module" else _known_parameters(model))
        warnings.warn(f"{field}: {target!r} matches no {kind} of the model.{near}", stacklevel=2)


def name_exactly(config: Any, model: nn.Module, names: set[str]) -> None:
    """Make a configuration name exactly the layers of these parameters in a model that has them.

    As it does, by name, or by an expression.
    """
    if config.target_modules and _names_exactly(config, model, names):
        return
    parameters = {
        weight
        for path, layer in model.named_modules()
        if isinstance(layer, ParameterLayer) and (weight := name_of_layer(path, layer)) in names
    }
    modules = {name.removesuffix(".weight") for name in names - parameters}
    for field in TARGET_FIELDS:
        setattr(config, field, None)
    config.target_modules, config.target_parameters = set(modules), sorted(parameters) or None
    if modules and not _names_exactly(config, model, names):  # one name is the end of another
        config.target_modules = "|".join(re.escape(name) for name in sorted(modules))


def _names_exactly(config: Any, model: nn.Module, names: set[str]) -> bool:
    matched = matched_modules(config, model).targets
    inside = tuple(f"{t.path}." for t in matched if isinstance(t.layer, ShiraLayer))
    return {target.name for target in matched if not target.path.startswith(inside)} == names


def _nothing_matched(config: ShiraConfig, model: nn.Module) -> TargetError:
    targets, names = config.target_modules, _known_names(model)
    wanted = re.findall(r"\w+", targets) if isinstance(targets, str) else sorted(targets or ())
    hints = {did_you_mean(word, names) for word in wanted}
    besides = "".join(
        f", with {field}={value!r}"
        for field in (*TARGET_FIELDS[1:], "modules_to_save")
        if (value := getattr(config, field)) is not None
    )
    if parameters := config.target_parameters:
        besides += f", nor a parameter of target_parameters={parameters!r}"
        known = _known_parameters(model)
        hints |= {did_you_mean(word, known) for word in parameters}
    return TargetError(
        f"Target modules {targets!r} not found in the base model{besides}. Please check the target "
        f"modules and try again.{''.join(sorted(hints))}"
    )


def _known_names(model: nn.Module) -> set[str]:
    """Return the names of modules, and the last parts of these that are words and not numbers."""
    names = {name for name, _ in model.named_modules() if name}
    names |= {base_module_name(name) for name in names}
    return names | {tail for name in names if not (tail := name.rpartition(".")[2]).isdigit()}


def _known_parameters(model: nn.Module) -> set[str]:
    """Return the names of parameters, and their ends: ``experts.down_proj``, ``down_proj``."""
    names = {base_module_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    ends = {".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2)}
    return names | {end for end in ends if not end.partition(".")[0].isdigit()}


def check_target(target: Target) -> None:
    """Check that an adapted layer can stand in for a module, a base layer or an adapted one."""
    if target.of_parameter:
        _check_parameter(target)
    else:
        _check_module(base_module_name(target.path), target.layer)


def _check_parameter(target: Target) -> None:
    name, around, parameter = target.name, target.module, target.layer.parameter_name
    module: nn.Module = base_of(around)
    if not target.path:
        raise TargetError(
            "Targeting an nn.Parameter on the top-level module is not supported (parameter "
            f"{parameter!r}): a layer has to be put in its module's place"
        )
    weight = weight_of(target.layer)
    while isinstance(around, ParameterLayer):
        around = around._modules["base_layer"]  # type: ignore[assignment]
    if isinstance(around, BaseTunerLayer):
        why = (
            f"its module is adapted by {type(around).__name__}; name it in target_modules or in "
            "target_parameters, not in both"
        )
    elif is_computed(target.layer):
        why = (
            "it is computed from other parameters (weight_norm, pruning or the like), so it cannot "
            "be given another value; remove the parametrization"
        )
    elif weight.dtype not in FLOATS.values() or backend_of(module) is not None:
        why = (
            f"it is {weight.dtype}, or packed by a quantization; SHiRA adapts parameters in "
            "float32, bfloat16, float16 and float64"
        )
    elif not full_shape(weight):
        why = "it is a single number; train it whole (modules_to_save)"
    elif type(module).forward is nn.Module.forward or isinstance(module, _CONTAINERS):
        why = (
            f"its module, {type(module).__name__}, has no forward of its own in which the adapted "
            "parameter could stand"
        )
    else:
        return
    raise TargetError(f"{name}: {why}; or leave it out of target_parameters")


_CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


def _check_module(name: str, target: nn.Module) -> None:
    base_layer = base_of(target)
    kind, layer_class = type(base_layer).__name__, layer_class_of(base_layer)
    if layer_class is None:
        raise TargetError(
            f"Target module {name} ({kind}) is not supported. SHiRA adapts torch.nn.Linear, "
            "transformers' Conv1D, torch.nn.Conv1d to Conv3d, torch.nn.ConvTranspose1d to "
            "ConvTranspose3d, torch.nn.Embedding and torch.nn.MultiheadAttention"
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
    elif (backend := backend_of(base_layer)) is not None:
        if hasattr(base_layer, "weight"):
            return
        packed_by = getattr(backend, "backend_name", "") or type(backend).__name__
        why = (
            f"{kind} ({packed_by}) keeps its packed weight under another name than `weight`, "
            "by which SHiRA finds it; quantize with bitsandbytes or torchao instead"
        )
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
        known = kind is object or kind.__module__.startswith("torch.")
        for method, function in () if known else vars(kind).items():
            code = getattr(function, "__code__", None)
            if method != "forward" and code is not None and "forward" in code.co_names:
                return method
    return None


def _refuse_model(named: Mapping[str, nn.Module]) -> None:
    """Refuse a model that takes PEFT's names, or divides its own weights for eval mode (RWKV)."""
    for name, part in named.items():
        if "base_layer" in part._modules and not isinstance(part, BaseTunerLayer):
            raise TargetError(
                f"the model's {name or 'root'} ({type(part).__name__}) has a part called "
                "'base_layer', the name by which PEFT knows an adapted layer; rename it, or adapt "
                "another part of the model"
            )
        config: Any = part.__dict__.get("config")
        if "layers_are_rescaled" in part.__dict__ and config.rescale_every:
            raise TargetError(
                f"{name or type(part).__name__} rewrites its weights between training and eval "
                f"mode (rescale_every={config.rescale_every}), which an adapter cannot follow; set "
                "model.config.rescale_every = 0 first"
            )


def _refuse_two_ways(targets: Iterable[Target]) -> None:
    """Refuse a parameter that ``target_parameters`` names, and ``target_modules`` its module."""
    targets = list(targets)
    parameters = [target for target in targets if target.of_parameter]
    modules = {id(base_of(t.layer)) for t in targets if t not in parameters}
    for target in parameters:
        if id(base_of(target.layer)) in modules:
            raise TargetError(
                f"{target.name!r} is named by target_parameters, and its module by target_modules, "
                "which is not a valid target; take it out of one of them"
            )


def _refuse_trained_whole(
    config: ShiraConfig, named: Mapping[str, nn.Module], targets: Iterable[Target]
) -> None:
    """Refuse to adapt within a module that is trained whole: it is copied, adapters and all.

    Of another adapter's ``modules_to_save`` too. What PEFT leaves out of the targets is none here.
    """
    ends = tuple(config.modules_to_save or ())
    whole = {path for path, module in named.items() if isinstance(module, ModulesToSaveWrapper)}
    whole |= {path for path in named if ends and path.endswith(ends)}
    if not whole:
        return
    inside = tuple(f"{path}." for path in whole)
    layers = {path: path for path, module in named.items() if isinstance(module, ShiraLayer)}
    for path, name in (layers | {target.path: target.name for target in targets}).items():
        if f"{path}.".startswith(inside):
            (above, *_) = [one for one in sorted(whole) if f"{path}.".startswith(f"{one}.")]
            raise TargetError(
                f"{base_module_name(name)!r} is adapted, and {base_module_name(above)!r}, which "
                "holds it, is trained whole (modules_to_save): a copy of it, adapters and all, "
                "could not be saved. Leave one of them out; unload() takes out earlier adapters"
            )


def _refuse_other_places(targets: Iterable[Target], named: Mapping[str, nn.Module]) -> None:
    """Refuse a target that is called from where an adapted layer cannot be put in its place.

    Such as a part of two modules, or of a list that a module keeps beside its parts: what is put
    in by name is then not what runs.
    """
    names = {id(target.module): target.path for target in targets}
    first: dict[int, tuple[int, str]] = {}
    for owner_name, owner in named.items():
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


def _refuse_shared_weights(targets: Iterable[Target]) -> None:
    """Refuse two targets with one weight between them: each would have its own entries in it."""
    seen: dict[int, str] = {}
    for target in targets:
        held = target.of_parameter or layer_class_of(base_of(target.layer))
        name = target.path if not isinstance(target.layer, ParameterOf) else target.name
        place = _place_of(stored_weight(target.layer)) if held else None
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
