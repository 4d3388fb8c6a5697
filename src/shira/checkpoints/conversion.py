# SPDX-License-Identifier: Apache-2.0
"""From the parameters of a model to the tensors of its checkpoint, as transformers loads them.

A checkpoint may call a tensor by another name than the module does (``language_model.model.`` for
``model.language_model.``), or hold it in other pieces: one matrix for each expert, where the module
has one parameter for all; queries, keys and values in one matrix, where it has three. transformers
maps the one to the other on loading, and back on saving, by rules of each class
(``transformers.conversion_mapping``). `places_of` asks those rules: it makes the model without
memory (on the ``meta`` device, from ``config.json``), renames the checkpoint's names as
``from_pretrained`` does, and runs the operations that join and split tensors on tensors without
memory, recording which view is copied where::

    experts.0.gate [i, h] --+
    experts.1.gate [i, h] --+-- stack --> [2, i, h] --+
    experts.0.up   [i, h] --+                         +-- cat, dim 1 --> gate_up [2, 2 i, h]
    experts.1.up   [i, h] --+-- stack --> [2, i, h] --+

Each arrow is a `Box`, so an entry of the parameter is followed back to its tensor at a cost of
O(1). What computes values, instead of moving them, has no place, and says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from logging import ERROR
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shira.checkpoints.boxes import Box, boxes_between, storage_key
from shira.errors import MergeError, WrongBaseError, listed
from shira.store.header import WHOLE_DTYPES, Stored

_aten = torch.ops.aten

Source: TypeAlias = "Stored | tuple[tuple[Box, Source], ...]"
"""A stored tensor, or a tensor that is made of copies of views of others."""


class Part(NamedTuple):
    """Some entries of a parameter that lie in one tensor of the checkpoint."""

    stored: Stored
    entries: Tensor | slice  # which of those that were asked for
    flat: Tensor  # (n,) where in the stored tensor; increasing, if they were asked for so


@dataclass(frozen=True)
class Place:
    """The place of a parameter in a checkpoint.

    Attributes:
        shape: The parameter's shape.
        source: One stored tensor, whose entries are in the same order, or pieces of several.
        fault: Why single entries have no place, if so.
    """

    shape: tuple[int, ...]
    source: Source
    fault: str = ""

    @cached_property
    def stored(self) -> tuple[Stored, ...]:
        """The tensors that the parameter lies in, each once."""
        return tuple(dict.fromkeys(_tensors_of(self.source)))

    @property
    def dtype(self) -> str:
        """The dtype there, in safetensors' words; several if the tensors differ."""
        return " and ".join(dict.fromkeys(stored.dtype for stored in self.stored))

    @property
    def key(self) -> str:
        """The checkpoint's name; the first ones of several."""
        keys = [stored.key for stored in self.stored]
        return keys[0] if len(keys) == 1 else listed(keys)

    @property
    def file(self) -> str:
        """The name of the file; of several if the parameter lies in several."""
        names = list(dict.fromkeys(stored.file.name for stored in self.stored))
        return names[0] if len(names) == 1 else listed(names)

    def split(self, flat: Tensor) -> list[Part]:
        """Follow ``(k,)`` increasing flat indices of the parameter to the stored tensors.

        Raises:
            MergeError: If there is a `fault`.
            WrongBaseError: If an entry is in no tensor.
        """
        if self.fault:
            raise MergeError(self.fault)
        if isinstance(self.source, Stored):
            return [Part(self.source, slice(None), flat)]
        parts = [*_follow(self.source, torch.arange(flat.numel(), device=flat.device), flat)]
        found = sum(part.flat.numel() for part in parts)
        if found != flat.numel():
            raise WrongBaseError(
                f"{flat.numel() - found} of {flat.numel()} entries of a parameter of shape "
                f"{self.shape} lie in no tensor of the checkpoint ({self.key})"
            )
        return parts


def as_it_is(name: str, shape: tuple[int, ...]) -> Place:
    """Return the place of a parameter that is one tensor of its own name, of no known file."""
    return Place(shape, Stored(name, Path(), "", shape, 0, 0))


def _tensors_of(source: Source) -> Iterator[Stored]:
    if isinstance(source, Stored):
        yield source
    else:
        for _, inner in source:
            yield from _tensors_of(inner)


def _follow(source: Source, entries: Tensor, flat: Tensor) -> Iterator[Part]:
    """Follow increasing indices; ``entries`` tells which of those asked for they are."""
    if isinstance(source, Stored):
        yield Part(source, entries, flat)
        return
    for box, inner in source:
        ends = torch.tensor([box.source_offset, box.source_end], dtype=flat.dtype)
        low, high = torch.searchsorted(flat, ends.to(flat.device)).tolist()
        inside, there = box.locate(flat[low:high])
        if not inside.numel():
            continue
        here = entries[low:high][inside]
        if bool((there[1:] < there[:-1]).any()):  # the view is transposed
            there, order = there.sort()
            here = here[order]
        yield from _follow(inner, here, there)


class Places(NamedTuple):
    """The parameters of a checkpoint's model.

    Attributes:
        by_name: The place of each, by the module's name; of tensors that the model does not load,
            by their own.
        mapped: The class whose rules were followed; empty if names are taken as they are.
        reason: Why none were, where the config tells of a model.
    """

    by_name: Mapping[str, Place]
    mapped: str = ""
    reason: str = ""


AS_STORED = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("olmo", "olmo2", "granite", "smollm3", "starcoder2", "stablelm", "cohere", "cohere2"),
}
"""Models whose parameters have the names and shapes of their files: not asked about, since the
import of transformers takes longer than many a merge. (Tests ask.)"""


def places_of(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Places:
    """Find where each parameter of the model of a config lies; see the module."""
    as_they_are = {key: Place(stored.shape, stored) for key, stored in tensors.items()}
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return Places(as_they_are)  # no model of transformers
    if kind in AS_STORED and all(key.startswith(("model.", "lm_head.")) for key in tensors):
        return Places(as_they_are)
    try:
        model = _model_of(config, len(tensors))
        found = _mapped(model, tensors)
    except Exception as error:  # of another release, damaged, or custom code: whatever it raises
        return Places(as_they_are, reason=f"{type(error).__name__}: {error}")
    if all(as_they_are.get(name) == place for name, place in found.items()):
        return Places(as_they_are)
    known = {stored.key for place in found.values() for stored in place.stored} | found.keys()
    others = {key: place for key, place in as_they_are.items() if key not in known}
    return Places(found | others, type(model).__name__)


def _model_of(config: Mapping[str, Any], count: int) -> nn.Module:
    """Make the model of a config without memory. Its checkpoint has ``count`` tensors."""
    config = _checked(config, 1000 + 10 * count)
    import transformers
    from transformers import initialization
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        told = transformers.PreTrainedConfig._decode_special_floats(config)
        made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(told)
        made._attn_implementation = "eager"
        names = [name for name in config.get("architectures") or () if isinstance(name, str)]
        kind = getattr(transformers, names[0], None) if names else None
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kind = transformers.MODEL_MAPPING[type(made)]
            kind = kind[0] if isinstance(kind, tuple) else kind
        safe = getattr(initialization, "meta_device_safe_creation_ops", _nothing)
        with torch.device("meta"), safe():
            model: nn.Module = kind(made)  # type: ignore[misc]
    finally:
        logging.set_verbosity(level)
    return model


@contextmanager
def _nothing() -> Iterator[None]:
    yield


_COUNTS = re.compile(r"^(num|n)_.*(layer|block|expert)|layers$|^depths?$")


_CODE = ("auto_map", "trust_remote_code", "attn_implementation", "experts_implementation")
_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's


def _checked(config: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Return a config, without the fields that ask for code of others.

    Raises:
        ValueError: If there are so many layers that making the model would take for ever, or a part
            of it is named that would be looked for on the hub.
    """
    checked = {}
    for field, value in config.items():
        if field.removeprefix("_") in _CODE:
            continue
        if isinstance(value, Mapping):
            value = _checked(value, limit)
        counts = value if isinstance(value, (list, tuple)) else [value]
        numbers = [0, *(n for n in counts if isinstance(n, (int, float)))]
        count = sum(numbers) if field.startswith("depth") else max(numbers)
        most = 1_000_000 if field == "num_labels" else limit if _COUNTS.search(field) else math.inf
        if count > most:
            raise ValueError(f"{field} is {count}, and the checkpoint has too few tensors")
        whole = config.get("backbone_config") or config.get("model_type") == "timm_backbone"
        if isinstance(value, str) and (
            value.startswith(_ELSEWHERE) or (field == "backbone" and not whole)
        ):
            raise ValueError(f"{field} is {value!r}, whose config would be looked for elsewhere")
        checked[field] = value
    return checked


def _mapped(model: Any, tensors: Mapping[str, Stored]) -> dict[str, Place]:
    """Rename and join as `convert_and_load_state_dict_in_model` of transformers does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    own, prefix = model.state_dict(), model.base_model_prefix
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, Place] = {}
    joined: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if name not in own:
            continue
        stored = tensors[key]
        if pattern is None:
            found.setdefault(name, Place(stored.shape, stored))
            continue
        if name not in joined:
            joined[name] = deepcopy(by_pattern[pattern]), {}
        rule, probes = joined[name]
        dtype = WHOLE_DTYPES.get(stored.dtype, torch.uint8)
        probes[key] = torch.empty(stored.shape, dtype=dtype, device="meta")
        rule.add_tensor(name, key, pattern, probes[key])
    for name, (rule, probes) in joined.items():
        trace = _Trace({key: (probe, tensors[key]) for key, probe in probes.items()})
        how = ", ".join(type(operation).__name__ for operation in rule.operations)
        try:
            with torch.no_grad(), trace:
                made = rule.convert(name, model=model, config=model.config)
                made = made[0] if isinstance(made, tuple) else made  # as transformers 5.0 has it
        except Exception as error:  # whatever an operation raises
            made = {name: error}
        for target, tensor in made.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            try:
                if isinstance(tensor, Exception):
                    raise tensor
                if target in own and own[target].shape != tensor.shape:
                    raise ValueError(
                        f"of shape {tuple(tensor.shape)}, not {tuple(own[target].shape)} as the "
                        "model's, they are not all that it is made of"
                    )
                found[target] = Place(tuple(tensor.shape), trace.source_of(tensor))
            except Exception as error:
                fault = (
                    f"{target!r} is made of {listed(probes)} on loading ({how}), and its entries "
                    f"cannot be followed there: {error}. Save the loaded model with "
                    "save_pretrained(..., save_original_format=False) and use that"
                )
                found[target] = Place(tuple(own[name].shape), (), fault)
    return found


_CLONES = {_aten.clone.default, _aten._to_copy.default}


class _Trace(TorchDispatchMode):
    """Record which tensors without memory are made of copies of which views of which others."""

    def __init__(self, stored: Mapping[str, tuple[Tensor, Stored]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources: dict[int, Source] = {}
        self.kept: list[Any] = []  # so that no storage takes the key of one that is gone
        self.computed: dict[int, str] = {}
        for probe, tensor in stored.values():
            self.sources[storage_key(probe)] = tensor
            self.kept.append(probe)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        copies: list[tuple[Tensor, Tensor]] = []  # (view of the result, what is copied there)
        if func in _CLONES and out.dtype == args[0].dtype:
            copies = [(out, args[0])]
        elif func in (_aten.cat.default, _aten.stack.default):
            dim, start = (*args[1:], *(kwargs or {}).values(), 0)[0], 0
            for index, tensor in enumerate(args[0]):
                if func is _aten.stack.default:
                    copies.append((out.select(dim, index), tensor))
                else:
                    copies.append((out.narrow(dim, start, tensor.shape[dim]), tensor))
                    start += tensor.shape[dim]
        if copies and all(storage_key(tensor) in self.sources for _, tensor in copies):
            self.sources[storage_key(out)] = tuple(
                (box, self.sources[storage_key(tensor)])
                for view, tensor in copies
                for box in boxes_between(view, tensor)
            )
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_key(tensor) not in self.sources:
                self.computed[storage_key(tensor)] = str(func)
        return out

    def source_of(self, tensor: Tensor) -> Source:
        """Return what a tensor is made of; `ValueError` if it was computed."""
        key = storage_key(tensor)
        if key not in self.sources:
            raise ValueError(f"{self.computed.get(key, 'another tensor')} computes it")
        inner = self.sources[key]
        entries = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.is_contiguous() and tensor.numel() == entries:
            return inner
        view = torch.empty(tensor.shape, device="meta")
        return tuple((box, inner) for box in boxes_between(view, tensor))
