# SPDX-License-Identifier: Apache-2.0
"""All that a configuration adapts: modules and parameters by name, rows of tokens, shared weights.

Modules with rows of tokens, and those that share a weight, are matched together: see `Matched`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from shira.errors import TargetError
from shira.store.names import base_module_name, is_parameter, is_sharded, name_of_layer
from shira.tuner.base_layer import ParameterOf, base_of, stored_weight
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import layer_class_of
from shira.tuner.parameter import ParameterLayer, wrapper_of
from shira.tuner.token_rows import token_rows


class Target(NamedTuple):
    """A layer, or a parameter of a module, that a configuration names."""

    path: str
    """Of the module in the model, as PEFT has it."""
    layer: Any
    """The layer, adapted already or not; for a parameter what adapts it, or a `ParameterOf`."""

    @property
    def of_parameter(self) -> bool:
        """A parameter is named, and no layer."""
        return isinstance(self.layer, (ParameterOf, ParameterLayer))

    @property
    def name(self) -> str:
        """Of the parameter, in the base model."""
        return name_of_layer(self.path, self.layer)

    @property
    def module(self) -> nn.Module:
        """The module in the model."""
        return self.layer.around if isinstance(self.layer, ParameterOf) else self.layer  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Matched:
    """The modules of a model that a configuration adapts, by their names there."""

    modules: Mapping[str, nn.Module]
    """Those that have the adapter."""
    rows: Mapping[str, list[int]] = field(default_factory=dict)
    """Of these, rows that ``trainable_token_indices`` has trained whole."""
    by_name: Collection[str] = ()
    """Of these, those with entries of their own, as ``target_modules`` names them."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Further modules that share the weight of one of these, and which."""
    parameters: Sequence[Target] = ()
    """Parameters of modules, as ``target_parameters`` names them, and those of attentions."""
    in_parts: Collection[str] = ()
    """Attentions that are named, whose parts stand in their place here."""

    @property
    def targets(self) -> list[Target]:
        """The modules that have the adapter, and the parameters."""
        return [*(Target(path, layer) for path, layer in self.modules.items()), *self.parameters]


def matched_modules(config: ShiraConfig, model: nn.Module) -> Matched:
    """Return the modules and parameters that a configuration names, as PEFT matches them.

    With ``ensure_weight_tying``, and for token rows always, the first of the modules that share a
    weight stands for all of them.
    """
    everything = dict(model.named_modules())
    named = _named(everything)
    found = [path for path, name in named.items() if check_target_module_exists(config, name)]
    rows = token_rows(config.trainable_token_indices, model)
    parameters = matched_parameters(config, model)
    attentions, found, parts = _attentions_in_parts(config, found, everything)
    known = {target.name for target in parameters}
    parameters += [target for target in parts if target.name not in known]
    if not rows and not config.ensure_weight_tying:
        modules = {name: everything[name] for name in found}
        return Matched(modules, {}, found, {}, parameters, attentions)
    owners = owners_of(model)
    own_rows: dict[str, list[int]] = {}
    for name, tokens in rows.items():
        owner = owners.get(name, name)
        if own_rows.setdefault(owner, tokens) != tokens:
            raise TargetError(
                f"trainable_token_indices: {owner!r} and {name!r} share one weight (tied weights), "
                "so their tokens are the same rows; name the same tokens for both, or one of them"
            )
    if config.ensure_weight_tying:
        found = list(dict.fromkeys(owners.get(name, name) for name in found))
    for name in () if config.ensure_weight_tying else found:
        if owners.get(name, name) in own_rows and (name in owners or name in owners.values()):
            raise TargetError(
                f"{name!r} is a target, and tokens of its weight are trained in all modules that "
                "share it (tied weights): set ensure_weight_tying=True, so that all its entries are"
            )
    adapted = {*found, *own_rows}
    for_all = adapted if config.ensure_weight_tying else own_rows.keys()
    tied = {name: owner for name, owner in owners.items() if owner in for_all}
    modules = {name: module for name, module in everything.items() if name in adapted}
    return Matched(modules, own_rows, found, tied, parameters, attentions)


def _named(everything: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the modules by their paths, and what a configuration calls them.

    That is the path, but for the parts of a module that a `ParameterLayer` stands around.
    """
    inside: tuple[str, ...] = ()
    names = {}
    for path, module in everything.items():
        if path and not (path.startswith(inside) and path.endswith("base_layer")):
            names[path] = base_module_name(path) if path.startswith(inside) else path
        if isinstance(module, ParameterLayer):
            inside = (*inside, f"{path}.")
    return names


def _attentions_in_parts(
    config: ShiraConfig, found: Sequence[str], everything: Mapping[str, nn.Module]
) -> tuple[list[str], list[str], list[Target]]:
    """Put the weights of an ``nn.MultiheadAttention`` in its place: it is no layer of one weight.

    They are its projections of the input, which are parameters of its own, and the layer
    ``out_proj``; but for what ``exclude_modules`` or ``modules_to_save`` name.

    Returns:
        The names of the attentions, of the modules that are left, and the parameters.
    """
    attentions: list[str] = []
    names: dict[str, None] = {}
    parameters: list[Target] = []
    for path in found:
        module = everything[path]
        base: Any = base_of(module)
        own = [name for name in _PROJECTIONS if base._parameters.get(name) is not None]
        if not own or not isinstance(base, nn.MultiheadAttention):
            names[path] = None
            continue
        attentions.append(path)
        (inner,) = (p for p, m in everything.items() if m is base)
        for name in own:
            target = Target(path, wrapper_of(module, name) or ParameterOf(base, name))
            if not kept_out(target.name, config.modules_to_save, config.exclude_modules):
                parameters.append(target)
        part = base_module_name(f"{inner}.out_proj")
        if not kept_out(part, config.modules_to_save, config.exclude_modules):
            names[f"{inner}.out_proj"] = None
    return attentions, [*names], parameters


_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def matched_parameters(config: ShiraConfig, model: nn.Module) -> list[Target]:
    """Return what ``target_parameters`` names: paths are those of the modules as they are called.

    That is of the outermost of the layers around a module that adapt its parameters.
    """
    if not config.target_parameters:
        return []
    found, tuners = [], set()
    for path, module in model.named_modules():
        above, _, part = path.rpartition(".")
        if isinstance(module, BaseTunerLayer) or (above in tuners and part != "base_layer"):
            tuners.add(path)  # and what is in it, but for its base layer
            continue
        parameters = [*module._parameters]
        if is_parametrized(module):
            parameters += [*module.parametrizations]  # type: ignore[arg-type]
        for parameter in parameters:
            target = Target(path, ParameterOf(module, parameter))
            if is_parameter(target.name, config.target_parameters):
                outer = _outermost(path, model)
                around = model.get_submodule(outer)
                adapted = wrapper_of(around, parameter)
                found.append(Target(outer, adapted or ParameterOf(around, parameter)))
    return found


def _outermost(path: str, model: nn.Module) -> str:
    while path.endswith("base_layer"):
        above = path.rpartition(".")[0]
        if not isinstance(model.get_submodule(above), BaseTunerLayer):
            break
        path = above
    return path


def owners_of(model: nn.Module) -> dict[str, str]:
    """Return ``{module: the first module that shares its weight}``, of all but the first ones.

    They are modules that SHiRA has a layer for, or has adapted already.
    """
    first: dict[Any, str] = {}
    owners: dict[str, str] = {}
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, ShiraLayer):
            inside = f"{name}."
        elif layer_class_of(module) is None:
            continue
        key = _weight_key(module)
        if key is not None and (owner := first.setdefault(key, name)) != name:
            owners[name] = owner
    return owners


def _weight_key(layer: nn.Module) -> Any:
    """Return what tells a layer's weight from others: its memory; where it has none, the object."""
    weight = stored_weight(layer)
    if not isinstance(weight, Tensor):
        return None
    if weight.is_meta or is_sharded(weight) or not weight.numel():
        return id(weight)
    return weight.data_ptr() or id(weight), weight.shape, weight.stride(), weight.dtype


def refuse_other_ties(model: nn.Module, matched: Matched) -> None:
    """Refuse to adapt a shared weight in another way than the adapters that are there do."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ShiraLayer)}
    now: dict[int, set[str]] = {}  # what is tied to each layer
    for name, layer in layers.items():
        if layer.tied_to is not None:
            now.setdefault(id(layer.tied_to), set()).add(name)
    wanted: dict[str, set[str]] = {owner: set() for owner in matched.modules}
    for name, owner in matched.tied.items():
        wanted[owner].add(name)
    for owner, names in wanted.items():
        of_owner = layers.get(owner)
        tied = now.get(id(of_owner), set())
        elsewhere = of_owner is not None and of_owner.tied_to is not None
        adapted = of_owner is not None and bool(of_owner.shira_weight)
        more = (names - tied) if adapted else (names - tied) & layers.keys()
        if elsewhere or more or tied - names:  # which compute with the owner's adapters
            raise TargetError(
                f"the weight of {owner!r} is shared (tied weights), and adapters of this model "
                f"have it adapted {'in all' if tied or elsewhere else 'in one'} of the modules "
                "that share it, but this configuration has it otherwise; give it the same "
                "ensure_weight_tying as theirs, or put it into a model of its own (unload() takes "
                "out what deleted adapters have left)"
            )


def kept_out(name: str, whole: Any, excluded: Any = None) -> bool:
    """Return whether ``modules_to_save`` or ``exclude_modules`` name a module, as PEFT matches."""
    named = SimpleNamespace(target_modules=[], modules_to_save=whole, exclude_modules=excluded)
    return check_target_module_exists(named, name) is not False
