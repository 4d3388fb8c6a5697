# SPDX-License-Identifier: Apache-2.0
"""The places of an adapter's parameters in a checkpoint, found by their names.

An adapter's names are the module's. A checkpoint's tensors go by the names that the module has for
them after loading (`Checkpoint.places`). The two may still differ by one prefix: a task model calls
``bert.encoder.layer.0...`` what its encoder's own checkpoint calls ``encoder.layer.0...``, and the
other way round. Names are taken as they are if the checkpoint has all of them, else with the one
prefix that makes it have all, else as names of the tensors in the file. What cannot be found is
explained: tied, packed by quantization, or misspelt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shira.adapter import Adapter
from shira.checkpoints.conversion import Place
from shira.checkpoints.opening import Checkpoint
from shira.delta import SparseDelta, same_tensor
from shira.errors import MergeError, WrongBaseError, did_you_mean, listed
from shira.store.config import TIED_FIELD
from shira.store.header import Stored

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


def locate(names: Iterable[str], checkpoint: Checkpoint) -> tuple[dict[str, Place], Prefix]:
    """Find the place of each parameter, and the change of prefix that finds them.

    Raises:
        WrongBaseError: If a parameter has no tensor, or several fit.
        MergeError: If it has none of its own because it is tied, or packed by quantization.
    """
    names = list(names)
    for places in (checkpoint.places.by_name, checkpoint.as_stored):
        prefix = match_names(names, places)
        if prefix is not None:
            return {name: places[prefix.apply(name) or name] for name in names}, prefix
    raise _not_found(names, checkpoint)


def without_tied(adapter: Adapter, checkpoint: Checkpoint) -> tuple[Adapter, set[str]]:
    """Return an adapter without what a checkpoint does not store, since it is tied to what it does.

    That is a parameter that the adapter changes just as the one it was trained as one with. Beside
    it, the names that may be tied: the adapter changes a head alike that the checkpoint has not.
    """
    names, twins = {*adapter, *adapter.tensors}, _twins(adapter, checkpoint)
    if not twins or has(names, checkpoint):
        return adapter, set()
    # a checkpoint has the first of the two, by the rules of most, or the second
    both = (names - twins.keys(), names - set(twins.values()))
    known = (checkpoint.places.by_name, checkpoint.as_stored)
    fits = [(match_names(some, keys), keys) for keys in known for some in both if some]
    prefix, keys = next((fit for fit in fits if fit[0] is not None), (None, {}))
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
) -> tuple[dict[str, Place], Prefix]:
    """Find the places of deltas and whole tensors, as `locate` does, of their shapes."""
    try:
        located, prefix = locate((*deltas, *whole), checkpoint)
    except WrongBaseError as error:
        if not whole or not deltas or not has([*deltas], checkpoint):
            raise
        raise WrongBaseError(
            f"{error} The adapter holds {listed(whole)} as a whole, trained under modules_to_save, "
            "to take the place of the checkpoint's: save the base with that module "
            "(save_pretrained of the model that was adapted) and merge into that"
        ) from None
    for name, place in located.items():
        shape = deltas[name].support.shape if name in deltas else tuple(whole[name].shape)
        if place.shape != shape:
            raise WrongBaseError(
                f"{checkpoint.path}: {place.key!r} has shape {place.shape}, but the adapter was "
                f"made for a {name!r} of shape {shape}"
            )
    return located, prefix


def has(names: Collection[str], checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint has each of the names, in one way."""
    keys = (checkpoint.places.by_name, checkpoint.as_stored)
    return any(match_names(names, some) is not None for some in keys)


def check_untied(places: Iterable[Place], checkpoint: Checkpoint) -> None:
    """Refuse tensors that the model also uses under another name: a change is for both.

    On disk that is an embedding that the output head shares: the config of a language model does
    not say that the two are apart, and there is no second tensor of the shape.
    """
    tensors = checkpoint.tensors.values()
    for stored in (stored for place in places for stored in place.stored):
        if not _is_embedding(stored, checkpoint) or not _ties(checkpoint):
            continue
        if sum(other.shape == stored.shape for other in tensors) == 1:
            raise MergeError(
                f"{checkpoint.path}: {stored.key!r} is tied: the checkpoint has no output head of "
                "its own, so writing there would change the head too. Train with "
                "ensure_weight_tying=True, or save the base with the two apart "
                "(tie_word_embeddings=False) and merge into that"
            )


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
    keys, where = checkpoint.places.by_name, checkpoint.path
    # the change of prefix that finds most of the names is that of the others
    candidates = {Prefix()}.union(*(_prefixes(name, keys) for name in names[:8]))
    best = max(candidates, key=lambda p: sum(p.apply(name) in keys for name in names))
    missing = [name for name in names if best.apply(name) not in keys]
    name = missing[0]
    module = name.removesuffix("weight").rstrip(".")
    ends = (*(f"{module}.{part}" for part in _PACKED), f"{name}_blocks")
    packed = [key for key in keys if key.endswith(ends)]
    if packed:
        return MergeError(
            f"{where}: {name!r} is quantized: the checkpoint holds {packed[0]!r} instead; merge "
            "into the checkpoint that it was quantized from"
        )
    stored = checkpoint.tensors.values()
    embedding = next((kept.key for kept in stored if _is_embedding(kept, checkpoint)), None)
    if name.endswith(_HEADS) and embedding:
        return MergeError(
            f"{where}: {name!r} is not in the checkpoint: it is tied to {embedding!r}, and writing "
            "there would change both. Train with ensure_weight_tying=True, or save the base with "
            "the two apart (tie_word_embeddings=False) and merge into that"
        )
    hint = did_you_mean(name, keys)
    if checkpoint.places.reason:
        hint += (
            " Its names were taken as they are, for transformers, which knows how its model's "
            f"differ, could not be asked ({checkpoint.places.reason})."
        )
    share = f" ({len(missing)} of {len(names)} are missing)" if len(names) > 1 else ""
    return WrongBaseError(
        f"{where}: there is no {name!r}, which the adapter changes{share}; is this its base?{hint}"
    )
