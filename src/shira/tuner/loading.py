# SPDX-License-Identifier: Apache-2.0
"""Loading an adapter into a model: everything about the file is checked before the model changes.

PEFT first puts layers into the model and then reads the weights. `read_incoming` runs before the
first and reads the file that belongs to the configuration, so that a bad file leaves the model as
it was; `check_state_dict` looks at what reaches the layers by any other way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from shira.base import Verdict, accept, judge
from shira.checkpoints import shapes_of
from shira.errors import FileFormatError, ShiraError, SupportError, did_you_mean, listed
from shira.store import PeftFile, read_peft, validate_against
from shira.store.config import TIED_FIELD
from shira.store.header import EntryError, check_values, in_order
from shira.store.names import (
    INDICES,
    VALUES,
    bare_name,
    base_module_name,
    is_parameter,
    weight_name,
)
from shira.support import Support
from shira.tuner.base_layer import base_values
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.matching import Matched, matched_modules
from shira.tuner.saving import by_own_names, is_elsewhere, layers_of, path_in_state

WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
"""Options of loading that say where and how a file is found on the hub."""


def weights_of(model_id: str, options: Mapping[str, Any]) -> str | None:
    """Return the safetensors file that PEFT is about to load with a configuration, if known."""
    if os.path.isdir(path := os.path.join(model_id, options.get("subfolder") or "")):
        local = os.path.join(path, SAFETENSORS_WEIGHTS_NAME)
        return local if os.path.exists(local) else None
    where = {name: options[name] for name in WHERE if name in options}
    try:
        return str(hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, **where))
    except Exception:  # PEFT will look for other files, and report what it cannot find
        return None


def read_incoming(config: ShiraConfig, model: nn.Module) -> dict[str, Support] | None:
    """Return the supports of the adapter whose config this is, all of its file checked.

    None if the config was not read by ``from_pretrained``, and so knows no file beside it.
    """
    if config._source is None or (source := config._source()) is None:
        return None
    file = read_peft(source)
    shapes = shapes_of(model)
    validate_against(file, shapes)
    layers: dict[str, Any] = {}  # an adapted layer rather than the base layer inside it
    matched = matched_modules(config, model)
    for target in matched.targets:
        if target.of_parameter or isinstance(getattr(target.layer, "weight", None), Tensor):
            layers.setdefault(target.name, target.layer)
    _check_tied(file, matched)
    present = {raw.weight_name for raw in file.tensors.values()}
    for name in sorted(layers.keys() ^ present):
        field = "target_parameters" if is_parameter(name, config.target_parameters) else ""
        field = field or "target_modules"
        why = f"unknown target: {name!r} is in the file, but not among the config's {field}"
        if name in layers:
            why = f"missing target: the config's {field} name {name!r}, the file has none"
        raise FileFormatError(f"{file.path}: {why}")
    _check_whole(file, config, model, shapes)
    rows = {weight_name(base_module_name(path)) for path in matched.rows}
    supports: dict[str, Support] = {}
    verdicts: dict[str, Verdict] = {}
    for raw in file.tensors.values():
        name = raw.weight_name
        supports[name] = Support.from_coordinates(shapes[name], raw.coordinates)
        held = base_values(layers[name], supports[name])
        if name in file.copies and name in rows and not isinstance(layers[name], ShiraLayer):
            # the embedding was resized, and PEFT is about to load the one that was trained with
            held = file.copies[name].view(-1)[supports[name].indices.long()]
        verdicts[name] = judge(vars(config), name, raw.values, held)
    accept(vars(config), verdicts, str(file.path), "pass a config whose base_fingerprint is None")
    return supports


def _check_tied(file: PeftFile, matched: Matched) -> None:
    """Refuse an adapter of tied weights for a model in which they are not, and the reverse.

    In the one model further modules compute with what the adapter changes, in the other they don't.
    """
    if not file.config:
        return  # nothing is told
    told = file.config.get(TIED_FIELD) or {}
    here = {weight_name(base_module_name(path)) for path in matched.tied}
    for name in sorted(told.keys() ^ here):
        how = "one with another weight" if name in told else "a weight of its own"
        raise FileFormatError(
            f"{file.path}: the adapter was trained on a model in which {name!r} is {how} (tied "
            f"weights), but in this one it is {'a weight of its own' if name in told else 'not'}; "
            "load the base as it was then (tie_word_embeddings), or use shira.Switch, which "
            "changes each of the weights"
        )


def check_file(model: nn.Module, model_id: str, options: Mapping[str, Any]) -> None:
    """Check the file that is about to be loaded into an adapter that is there already.

    Nothing is checked if there is no configuration beside it, which PEFT does not need then.
    """
    where = {name: options[name] for name in WHERE if name in options}
    try:
        config = PeftConfig.from_pretrained(model_id, **where)
    except ValueError as error:
        if isinstance(error, ShiraError):
            raise
        return
    if isinstance(config, ShiraConfig):
        read_incoming(config, model)


def _check_whole(
    file: PeftFile, config: ShiraConfig, model: nn.Module, shapes: Collection[str]
) -> None:
    """Check that the model has the file's whole tensors, and the file all of ``modules_to_save``.

    PEFT does so late, when it has changed the model, or not at all.
    """
    for name in file.whole:
        if name not in shapes:
            raise FileFormatError(
                f"{file.path}: unknown target: the file has the whole of {name!r}, but the base "
                f"model has no such parameter or buffer.{did_you_mean(name, shapes)}"
            )
    modules = tuple(config.modules_to_save or ())
    for path, module in model.named_modules():
        if not modules or not path.endswith(modules):
            continue
        name = base_module_name(path)
        for key in getattr(module, "original_module", module).state_dict():
            if f"{name}.{key}" not in file.whole:
                raise FileFormatError(
                    f"{file.path}: missing tensor: the config's modules_to_save name {name!r}, but "
                    f"the file does not hold its {key!r}"
                )


def named_for_loading(
    model: nn.Module,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    ignore_mismatched_sizes: bool = False,
    loaded_whole: bool = False,
) -> dict[str, Tensor]:
    """Return an adapter's state dict with the names by which PEFT loads it, whole tensors checked.

    With ``ignore_mismatched_sizes`` PEFT leaves out those of other shapes; if it has
    ``loaded_whole`` the modules that the adapter trains whole, they are not looked at.
    """
    named = by_own_names(model, dict(state_dict))
    if is_elsewhere(named):
        return named
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    own = {name: tuple(tensor.shape) for name, tensor in tensors}
    wanted: dict[str, tuple[int, ...]] = {}
    for path, wrapper in () if loaded_whole else model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            for stored, inside in wrapper.adapter_state_dict_load_map(adapter_name).items():
                wanted[f"{path_in_state(path)}.{stored}"] = own[f"{path}.{inside}"]
    for key in sorted(wanted.keys() - named.keys()):
        raise FileFormatError(
            f"adapter {adapter_name!r} trains whole modules, but its state dict has no {key!r}"
        )
    names = {bare_name(name): name for name in own}
    result: dict[str, Tensor] = {}
    for key, tensor in named.items():
        name, shape = key, wanted.get(key)
        if shape is None and not is_sparse(key):
            bare = bare_name(key)
            if bare not in names:
                raise FileFormatError(
                    f"{key!r} is no tensor of SHiRA's, nor one that the model or a module that "
                    f"adapter {adapter_name!r} trains whole has: it would be left out."
                    f"{did_you_mean(bare, names)}"
                )
            name, shape = path_in_state(names[bare]), own[names[bare]]
        other = shape not in (None, tuple(tensor.shape))
        if other and not (ignore_mismatched_sizes or loaded_whole):
            raise FileFormatError(
                f"{key!r} has shape {tuple(tensor.shape)}, but the model's has {shape}"
            )
        result[name] = tensor
    return result


def check_state_dict(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is about to be loaded into the layers, checked and sorted; make room for it."""
    checked, supports = checked_state(model, adapter_name, state_dict)
    for path, layer in layers_of(model, adapter_name).items():
        old = layer.shira_weight[adapter_name]
        if path in supports and len(old) != (support := supports[path]).nnz:
            room = nn.Parameter(old.new_zeros(support.nnz), requires_grad=old.requires_grad)
            layer.shira_weight[adapter_name] = room
            layer.shira_indices[adapter_name] = support.coordinates().to(old.device)
    return checked


def checked_state(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Support]]:
    """Return a state dict checked and sorted, and the supports in it by the layers' paths."""
    layers = layers_of(model, adapter_name)
    kinds = (VALUES, INDICES)  # a state dict may be that of the whole model, with other adapters
    of_layers = (
        (path, name) for path, one in layers_of(model).items() for name in one.shira_weight
    )
    known = {f"{path}.{kind}.{name}" for path, name in of_layers for kind in kinds}
    for key in filter(is_sparse, state_dict):
        if key not in known:
            path = base_module_name(key.partition(f".{VALUES}")[0].partition(f".{INDICES}")[0])
            raise FileFormatError(
                f"{key!r} is for no layer that adapter {adapter_name!r} has in this model."
                f"{did_you_mean(path, map(base_module_name, layers))}"
            )
    checked = dict(state_dict)
    supports: dict[str, Support] = {}
    for path, layer in layers.items():
        keys = value_key, index_key = [f"{path}.{kind}.{adapter_name}" for kind in kinds]
        present = [key for key in keys if key in state_dict]
        if len(present) == 1:
            raise FileFormatError(f"of {value_key} and {index_key} only {present[0]!r} is there")
        if present:
            values, indices = state_dict[value_key], state_dict[index_key]
            checked[value_key], supports[path] = _sorted(layer, value_key, values, indices)
            checked[index_key] = supports[path].coordinates()
    if layers and not supports:
        raise FileFormatError(
            f"no tensor is for adapter {adapter_name!r}; its layers are like "
            f"{base_module_name(min(layers))!r}, the {len(state_dict)} names given like "
            f"{min(state_dict, default=None)!r}"
        )
    return checked, supports


def check_loaded(model: nn.Module, adapter_name: str, info: Any) -> None:
    """Check what transformers' own ``load_adapter`` has put into a model, past PEFT's functions."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, ShiraConfig):
        return
    of_adapter = re.compile(rf".*\.{re.escape(adapter_name)}(\.|$)")
    missing = sorted(filter(of_adapter.match, info.missing_keys))
    if missing or info.unexpected_keys:
        what = "what fits"
        if config.target_parameters:
            what = "target_parameters, whose names transformers' own load_adapter does not know"
        raise FileFormatError(
            f"adapter {adapter_name!r}: {len(missing)} of the model's tensors are not in what was "
            f"loaded ({listed(missing)}), and {len(info.unexpected_keys)} there are none of the "
            f"model's ({listed(sorted(info.unexpected_keys))}). "
            f"PeftModel.from_pretrained(model, folder) of shira loads {what}"
        )
    for path, layer in layers_of(model, adapter_name).items():
        values, indices = layer.shira_weight[adapter_name], layer.shira_indices[adapter_name]
        key = f"{path}.{VALUES}.{adapter_name}"
        ordered, support = _sorted(layer, key, values.detach(), indices)
        if not torch.equal(support.coordinates(), indices):
            values.data.copy_(ordered)
            layer.shira_indices[adapter_name] = support.coordinates()


def is_sparse(key: str) -> bool:
    """Return whether a name is that of values or positions, with or without an adapter's name."""
    return bool({VALUES, INDICES} & set(key.split(".")[-2:]))


def _sorted(layer: ShiraLayer, key: str, values: Tensor, indices: Tensor) -> tuple[Tensor, Support]:
    """Return a layer's values, which are called ``key``, in the order of their positions; these."""
    try:
        shape = tuple(values.shape)
        if values.dim() != 1 or not values.is_floating_point():
            raise EntryError(f"values are (k,) floating point, not {shape} {values.dtype}")
        check_values(values)
        key, shape = key.replace(VALUES, INDICES), tuple(indices.shape)
        if shape != (2, len(values)):
            raise EntryError(f"indices of shape {shape} do not fit {len(values)} values")
        coordinates, values = in_order(indices, values)
        return values, Support.from_coordinates(layer.weight_shape, coordinates)
    except (EntryError, SupportError) as error:
        raise FileFormatError(f"{key}: {error}") from error
