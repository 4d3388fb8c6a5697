# SPDX-License-Identifier: Apache-2.0
"""From an adapter's parameter names to the tensors of a checkpoint.

They are the same, or differ by one prefix: a task model calls ``bert.encoder.layer.0...`` what its
encoder's own checkpoint calls ``encoder.layer.0...``, and the other way round. Names are taken as
they are if the checkpoint has all of them, else with the one prefix that makes it have all. What
cannot be found is explained: tied, packed by quantization, fused on loading, or misspelt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from shira.checkpoints.opening import Checkpoint, Stored
from shira.delta import SparseDelta
from shira.errors import MergeError, WrongBaseError, did_you_mean, listed

_HEADS = ("lm_head.weight", "decoder.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_PACKED = ("qweight", "weight_packed", "weight_scale", "weight.absmax", "weight_blocks")
_LANGUAGE_MODELS = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"),
    *("ForPreTraining", "DoubleHeadsModel"),
)


@dataclass(frozen=True)
class Prefix:
    """How the adapter's names become the checkpoint's: ``removed`` goes, ``added`` comes."""

    removed: str = ""
    added: str = ""

    def apply(self, name: str) -> str | None:
        """The checkpoint's name; None for a name that lacks what is to be removed."""
        if not name.startswith(self.removed):
            return None
        return self.added + name[len(self.removed) :]

    def __str__(self) -> str:
        if self.removed:
            return f"names without the adapter's prefix {self.removed!r}"
        return f"names with the prefix {self.added!r}" if self.added else "the adapter's own names"


def match_names(names: Collection[str], keys: Collection[str]) -> Prefix | None:
    """The one change of prefix with which all ``names`` are among ``keys``; None without one.

    Raises:
        WrongBaseError: If there are several.
    """
    keys = set(keys)
    if all(name in keys for name in names):
        return Prefix()
    first = next(iter(names))
    candidates = {Prefix(added=key[: -len(first)]) for key in keys if key.endswith(f".{first}")} | {
        Prefix(removed=first[: -len(key)]) for key in keys if first.endswith(f".{key}")
    }
    fits = [p for p in candidates if all(p.apply(name) in keys for name in names)]
    if len(fits) > 1:
        raise WrongBaseError(
            f"the adapter's names fit the checkpoint in {len(fits)} ways: "
            f"{', or '.join(sorted(map(str, fits)))}"
        )
    return fits[0] if fits else None


def locate(names: Iterable[str], checkpoint: Checkpoint) -> tuple[dict[str, Stored], Prefix]:
    """Find the stored tensor of each parameter.

    Args:
        names: An adapter's parameter names.
        checkpoint: Where to look.

    Returns:
        Tensors by parameter name, and the change of prefix that found them.

    Raises:
        WrongBaseError: If a parameter has no tensor, or several fit.
        MergeError: If it has none of its own because it is tied, or packed by quantization.
    """
    names = list(names)
    if not names:
        return {}, Prefix()
    prefix = match_names(names, checkpoint.tensors)
    if prefix is None:
        raise _not_found(names, checkpoint)
    return {name: checkpoint.tensors[prefix.apply(name) or name] for name in names}, prefix


def locate_deltas(
    deltas: Mapping[str, SparseDelta],
    checkpoint: Checkpoint,
    whole: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, Stored], Prefix]:
    """Find the stored tensor of each delta, as `locate` does; each has its delta's shape.

    Args:
        deltas: By parameter name.
        checkpoint: Where to look.
        whole: Whole tensors, whose places are to be found too.

    Raises:
        WrongBaseError: As `locate`, and if a tensor has another shape.
        MergeError: As `locate`.
    """
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


def check_untied(located: Iterable[Stored], checkpoint: Checkpoint) -> None:
    """Refuse an embedding that the model's output head shares.

    The adapter was trained on the embedding alone; written into the shared tensor, it would change
    the head as well. A head of its own is a second tensor of the embedding's shape.

    Raises:
        MergeError: If the config of a language model does not say that the two are apart, and the
            checkpoint holds no head.
    """
    for stored in located:
        if not _is_embedding(stored, checkpoint) or not _ties(checkpoint):
            continue
        if sum(other.shape == stored.shape for other in checkpoint.tensors.values()) == 1:
            raise MergeError(
                f"{checkpoint.path}: {stored.key!r} is tied: the checkpoint has no output head of "
                "its own, so writing there would change the head too. Save the base with the two "
                "apart (tie_word_embeddings=False) and merge into that"
            )


def _is_embedding(stored: Stored, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor is of words, by its name or by the vocabulary that the config has."""
    text = checkpoint.config.get("text_config")
    configs = [checkpoint.config, *([text] if isinstance(text, dict) else [])]
    words = [config.get("vocab_size") for config in configs]
    return stored.key.endswith(_EMBEDDINGS) or (len(stored.shape) == 2 and stored.shape[0] in words)


def _ties(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    made = config.get("architectures") or []
    if not any(str(name).endswith(_LANGUAGE_MODELS) for name in made):
        return False
    text = config.get("text_config")
    told = [config.get("tie_word_embeddings")]
    told += [text.get("tie_word_embeddings")] if isinstance(text, dict) else []
    return False not in told


def _not_found(names: list[str], checkpoint: Checkpoint) -> Exception:
    """What to say of names that the checkpoint lacks."""
    keys, where = checkpoint.tensors, checkpoint.path
    best = _best_prefix(names, keys)
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
            "there would change both. Save the base with the two apart "
            "(tie_word_embeddings=False) and merge into that"
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


def _best_prefix(names: list[str], keys: Collection[str]) -> Prefix:
    """The change of prefix that finds most of the names, for the message about the others."""
    candidates = {Prefix()}
    for name in names[:8]:
        candidates |= {Prefix(added=k[: -len(name)]) for k in keys if k.endswith(f".{name}")}
        candidates |= {Prefix(removed=name[: -len(k)]) for k in keys if name.endswith(f".{k}")}
    return max(candidates, key=lambda p: sum(p.apply(name) in keys for name in names))
