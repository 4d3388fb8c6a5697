# SPDX-License-Identifier: Apache-2.0
"""The weights of a base model, by an adapter's parameter names, from wherever the model is.

An adapter's names are the checkpoint's, or differ by one prefix: a task model calls
``bert.encoder.layer.0...`` what its encoder's own checkpoint calls ``encoder.layer.0...``, and the
other way round. Names are taken as they are if the checkpoint has all of them, else with the one
prefix that makes it have all. What cannot be found is explained: tied, packed by quantization,
fused on loading, or misspelt.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.checkpoints.entries import read_blocks, read_entries
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.delta import SparseDelta, same_tensor
from shira.errors import AdapterError, MergeError, WrongBaseError, did_you_mean, listed
from shira.store.config import TIED_FIELD
from shira.store.header import FLOATS, Stored
from shira.store.names import base_module_name, full_shape, unwrapped

Base: TypeAlias = "nn.Module | str | os.PathLike[str] | Checkpoint | Mapping[str, Sequence[int]]"
"""A base model, its checkpoint as `open_checkpoint` takes it, or ``{parameter name: shape}``."""

Model: TypeAlias = "str | os.PathLike[str] | Checkpoint | nn.Module | Mapping[str, Tensor]"
"""A checkpoint as `open_checkpoint` takes it, a module, or a state dict."""

PIECE = 2**20
"""Entries of a piece of a tensor: 4 MiB of float32."""

_HEADS = ("lm_head.weight", "decoder.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_PACKED = ("qweight", "weight_packed", "weight_scale", "weight.absmax", "weight_blocks")
_LANGUAGE_MODELS = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"),
    *("ForPreTraining", "DoubleHeadsModel"),
)


@dataclass(frozen=True)
class Prefix:
    """The change from an adapter's names to the checkpoint's: ``removed`` goes, ``added`` comes."""

    removed: str = ""
    added: str = ""

    def apply(self, name: str) -> str | None:
        """Return the checkpoint's name; None for a name that lacks what is to be removed."""
        if not name.startswith(self.removed):
            return None
        return self.added + name[len(self.removed) :]

    def __str__(self) -> str:
        if self.removed:
            return f"names without the adapter's prefix {self.removed!r}"
        return f"names with the prefix {self.added!r}" if self.added else "the adapter's own names"


def match_names(names: Collection[str], keys: Collection[str]) -> Prefix | None:
    """Find the one change of prefix with which all names are among the keys; None without one."""
    keys = set(keys)
    if all(name in keys for name in names):
        return Prefix()
    candidates = _prefixes(next(iter(names)), keys)
    fits = [p for p in candidates if all(p.apply(name) in keys for name in names)]
    if len(fits) > 1:
        raise WrongBaseError(
            f"the adapter's names fit the checkpoint in {len(fits)} ways: "
            f"{', or '.join(sorted(map(str, fits)))}"
        )
    return fits[0] if fits else None


def _prefixes(name: str, keys: Iterable[str]) -> set[Prefix]:
    """Return the changes of prefix with which a name is one of the keys."""
    keys = list(keys)
    longer = {Prefix(added=key[: -len(name)]) for key in keys if key.endswith(f".{name}")}
    return longer | {Prefix(removed=name[: -len(k)]) for k in keys if name.endswith(f".{k}")}


def locate(names: Iterable[str], checkpoint: Checkpoint) -> tuple[dict[str, Stored], Prefix]:
    """Find the stored tensor of each parameter, and the change of prefix that finds them.

    Raises:
        WrongBaseError: If a parameter has no tensor, or several fit.
        MergeError: If it has none of its own because it is tied, or packed by quantization.
    """
    names = list(names)
    prefix = match_names(names, checkpoint.tensors)
    if prefix is None:
        raise _not_found(names, checkpoint)
    return {name: checkpoint.tensors[prefix.apply(name) or name] for name in names}, prefix


def without_tied(adapter: Adapter, checkpoint: Checkpoint) -> tuple[Adapter, set[str]]:
    """Return an adapter without what a checkpoint does not store, since it is tied to what it does.

    That is a parameter that the adapter changes just as the one it was trained as one with. Beside
    it, the names that may be tied: the adapter changes a head alike that the checkpoint has not.
    """
    names, keys = {*adapter, *adapter.tensors}, checkpoint.tensors
    twins = _twins(adapter, checkpoint)
    if not twins or match_names(names, keys) is not None:
        return adapter, set()
    # a checkpoint has the first of the two, by the rules of most, or the second
    both = (names - twins.keys(), names - set(twins.values()))
    prefix = next(filter(None, (match_names(some, keys) for some in both if some)), None)
    if prefix is None:
        return adapter, set()
    stored = {name for name in names if prefix.apply(name) in keys}
    gone = {name for pair in twins.items() for name in pair} - stored
    heads: set[str] = set()
    for pair in twins.items():
        for name, twin in (pair, pair[::-1]):
            if (
                name in gone
                and twin in stored
                and not name.endswith((*_EMBEDDINGS, "shared.weight"))
            ):
                heads.add(twin)
    deltas = {name: delta for name, delta in adapter.items() if name not in gone}
    whole = {name: tensor for name, tensor in adapter.tensors.items() if name not in gone}
    return Adapter(deltas, adapter.metadata, whole), heads


def _twins(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, str]:
    """Return ``{parameter: another that was one with it in training}``, both changed alike."""
    told = adapter.metadata.get(TIED_FIELD)
    pairs = [*told.items()] if isinstance(told, Mapping) else []
    twins = {
        name: owner
        for name, owner in pairs
        if name in adapter and owner in adapter and adapter[name] == adapter[owner]
    }
    if adapter.tensors and _ties(checkpoint):
        embeddings = [name for name in adapter.tensors if name.endswith(_EMBEDDINGS)]
        for name in adapter.tensors if embeddings else ():
            one, other = adapter.tensors[name], adapter.tensors[embeddings[0]]
            if name.endswith(_HEADS) and same_tensor(one, other):
                twins[name] = embeddings[0]
    return twins


def locate_deltas(
    deltas: Mapping[str, SparseDelta], checkpoint: Checkpoint, whole: Mapping[str, Tensor]
) -> tuple[dict[str, Stored], Prefix]:
    """Find the stored tensors of deltas and whole tensors, as `locate` does, of their shapes."""
    try:
        located, prefix = locate((*deltas, *whole), checkpoint)
    except WrongBaseError as error:
        if not whole or not deltas or match_names(list(deltas), checkpoint.tensors) is None:
            raise
        raise WrongBaseError(
            f"{error} The adapter holds {listed(whole)} as a whole, trained under modules_to_save, "
            "to take the place of the checkpoint's: save the base with that module "
            "(save_pretrained of the model that was adapted) and merge into that"
        ) from None
    for name, stored in located.items():
        shape = deltas[name].support.shape if name in deltas else tuple(whole[name].shape)
        if stored.shape != shape:
            raise WrongBaseError(
                f"{stored.file}: {stored.key!r} has shape {stored.shape}, but the adapter was made "
                f"for a {name!r} of shape {shape}"
            )
    return located, prefix


def _is_embedding(stored: Stored, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor is of words, by its name or by the vocabulary that the config has."""
    words = _told(checkpoint, "vocab_size")
    return stored.key.endswith(_EMBEDDINGS) or (len(stored.shape) == 2 and stored.shape[0] in words)


def _ties(checkpoint: Checkpoint) -> bool:
    made = checkpoint.config.get("architectures") or []
    language_model = any(str(name).endswith(_LANGUAGE_MODELS) for name in made)
    return language_model and False not in _told(checkpoint, "tie_word_embeddings")


def _told(checkpoint: Checkpoint, field: str) -> list[Any]:
    """Return a field of the config, and of its text model's."""
    text = checkpoint.config.get("text_config")
    configs = [checkpoint.config, *([text] if isinstance(text, dict) else [])]
    return [config.get(field) for config in configs]


def _not_found(names: list[str], checkpoint: Checkpoint) -> Exception:
    """Explain names that the checkpoint lacks."""
    keys, where = checkpoint.tensors, checkpoint.path
    # the change of prefix that finds most of the names is that of the others
    candidates = {Prefix()}.union(*(_prefixes(name, keys) for name in names[:8]))
    best = max(candidates, key=lambda p: sum(p.apply(name) in keys for name in names))
    missing = [name for name in names if best.apply(name) not in keys]
    name = missing[0]
    module = name.removesuffix("weight").rstrip(".")
    packed = [key for key in keys if key.endswith(tuple(f"{module}.{part}" for part in _PACKED))]
    if packed:
        return MergeError(
            f"{where}: {name!r} is quantized: the checkpoint holds {packed[0]!r} instead; merge "
            "into the checkpoint that it was quantized from"
        )
    embedding = next((key for key, kept in keys.items() if _is_embedding(kept, checkpoint)), None)
    if name.endswith(_HEADS) and embedding:
        return MergeError(
            f"{where}: {name!r} is not in the checkpoint: it is tied to {embedding!r}, and writing "
            "there would change both. Train with ensure_weight_tying=True, or save the base with "
            "the two apart (tie_word_embeddings=False) and merge into that"
        )
    fused = next((key for key in keys if ".experts.0." in key), None)
    hint = did_you_mean(name, keys)
    if fused and ".experts." in name:
        hint = (
            f" It holds experts one by one ({fused!r}), which transformers 5 joins on loading: "
            "save the loaded model with save_pretrained(..., save_original_format=False) and "
            "merge into that."
        )
    share = f" ({len(missing)} of {len(names)} are missing)" if len(names) > 1 else ""
    return WrongBaseError(
        f"{where}: there is no {name!r}, which the adapter changes{share}; is this its base?{hint}"
    )


def shapes_of(base: Base, names: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a base model's weights by parameter name.

    Args:
        base: An ``nn.Module`` (wrapped or adapted ones count as the base inside), the path or hub
            name of a safetensors checkpoint, an open one, or the shapes themselves.
        names: An adapter's parameter names, which a checkpoint may hold with another prefix. The
            result has these, or all that there are if it is None; of a module or a mapping always
            all.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If there is no safetensors checkpoint, or it is damaged.
        WrongBaseError: If a checkpoint lacks one of the names.

    Example:
        >>> shapes_of(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        {'0.weight': (2, 3), '0.bias': (2,)}
    """
    if isinstance(base, nn.Module):
        root = unwrapped(base)
        tensors = (
            *root.named_buffers(remove_duplicate=False),
            *root.named_parameters(remove_duplicate=False),
        )
        # PEFT keeps a module that an adapter trains whole as its original_module.
        return {
            base_module_name(name).replace(".original_module.", "."): full_shape(tensor)
            for name, tensor in tensors
        }
    if isinstance(base, Mapping):
        return {name: tuple(int(size) for size in shape) for name, shape in base.items()}
    checkpoint = open_checkpoint(base)
    stored = checkpoint.tensors if names is None else locate(names, checkpoint)[0]
    return {name: tensor.shape for name, tensor in stored.items()}


class OnDisk:
    """The floating-point tensors of a checkpoint, no more than a piece of them in memory at a time.

    Attributes:
        label: What to call the model in messages.
        shapes: Shapes of the tensors that a delta can be added to, by name.
        others: Dtypes of the tensors that none can be added to, by name.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.label = str(checkpoint.path)
        tensors = checkpoint.tensors.items()
        self.shapes = {name: t.shape for name, t in tensors if t.dtype in FLOATS}
        self.others = {name: t.dtype for name, t in tensors if t.dtype not in FLOATS}

    def check_untied(self, names: Iterable[str]) -> None:
        """Refuse tensors that the model also uses under another name: a change is for both.

        On disk that is an embedding that the output head shares: the config of a language model
        does not say that the two are apart, and there is no second tensor of the shape.
        """
        tensors = self.checkpoint.tensors
        for name in names:
            shape = tensors[name].shape
            if not _is_embedding(tensors[name], self.checkpoint) or not _ties(self.checkpoint):
                continue
            if sum(other.shape == shape for other in tensors.values()) == 1:
                raise MergeError(
                    f"{self.label}: {name!r} is tied: the checkpoint has no output head of its "
                    "own, so writing there would change the head too. Train with "
                    "ensure_weight_tying=True, or save the base with the two apart "
                    "(tie_word_embeddings=False) and merge into that"
                )

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return FLOATS[self.checkpoint.tensors[name].dtype]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Give a tensor as 1-D pieces of `PIECE` entries, in row-major order, on the CPU."""
        return read_blocks(self.checkpoint.tensors[name], PIECE)

    def entries(self, name: str, flat: Tensor) -> Tensor:
        """Return ``(k,)`` values of a tensor at increasing flat indices, on the CPU."""
        return read_entries(self.checkpoint.tensors[name], flat.cpu())


class InMemory:
    """Tensors that are there already; attributes and methods are those of `OnDisk`."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        floats = FLOATS.values()
        self._tensors = {name: t.detach() for name, t in tensors.items() if t.dtype in floats}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.others = {n: str(t.dtype) for n, t in tensors.items() if t.dtype not in floats}

    def check_untied(self, names: Iterable[str]) -> None:
        """See `OnDisk`."""
        memory = {name: (t.data_ptr(), t.numel()) for name, t in self._tensors.items()}
        for name in names:
            same = [n for n, m in memory.items() if m == memory[name] and m[0] and n != name]
            if same:
                raise MergeError(
                    f"{self.label}: {name!r} is tied: it is the same tensor as "
                    f"{listed(same)}, which would change too. Give each a copy of its own"
                )

    def dtype(self, name: str) -> torch.dtype:
        """See `OnDisk`."""
        return self._tensors[name].dtype

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `OnDisk`."""
        # One that is not contiguous is copied whole, and only while it is looked at.
        whole = self._tensor(name).reshape(-1)
        for low in range(0, whole.numel(), PIECE):
            yield whole[low : low + PIECE].cpu()

    def entries(self, name: str, flat: Tensor) -> Tensor:
        """See `OnDisk`."""
        tensor = self._tensor(name)
        return torch.take(tensor, flat.to(tensor.device).long()).cpu()

    def _tensor(self, name: str) -> Tensor:
        if (tensor := self._tensors[name]).is_meta:
            raise AdapterError(
                f"{self.label}: {name!r} has no values: it is on the meta device, or offloaded; "
                "load the model without offloading, or give the path of its checkpoint"
            )
        return tensor


Source: TypeAlias = OnDisk | InMemory


def source_of(model: Model, *, all_names: bool = False) -> Source:
    """Open the tensors of a model.

    ``all_names`` lists a parameter of a module under each of its names, not the first alone.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If there is no safetensors checkpoint, or it is damaged.
        AdapterError: If a value of the mapping is no tensor.
    """
    if isinstance(model, nn.Module):
        named = unwrapped(model).named_parameters(remove_duplicate=not all_names)
        return InMemory({base_module_name(n): p.detach() for n, p in named}, type(model).__name__)
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            if not isinstance(tensor, Tensor):
                raise AdapterError(
                    f"a state dict maps names to tensors, not {name!r} to {type(tensor).__name__}"
                )
        return InMemory(model, "the state dict")
    return OnDisk(open_checkpoint(model))


def names_in(source: Source, names: Sequence[str], whose: str) -> dict[str, str]:
    """Return what a model calls each weight; ``whose`` is what changes them, for the message."""
    prefix = match_names(names, source.shapes)
    if prefix is None:
        odd = next((name for name in names if name not in source.shapes), names[0])
        packed = f" (it has one of {source.others[odd]})" if odd in source.others else ""
        raise WrongBaseError(
            f"{source.label}: there is no {odd!r} of floating point{packed}, which the {whose} "
            f"changes; is this its base?{did_you_mean(odd, source.shapes)}"
        )
    return {name: prefix.apply(name) or name for name in names}
