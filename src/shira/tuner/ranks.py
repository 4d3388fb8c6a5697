# SPDX-License-Identifier: Apache-2.0
"""All processes of a run train the same positions, or the run stops: `check_ranks`.

Data parallelism averages gradients entry by entry. If two ranks chose different entries, the first
gradient of one is averaged with that of another weight of the other; nothing fails and the training
is silently wrong. So each rank hashes its positions and compares before the first training step.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from shira.errors import RankMismatchError

if TYPE_CHECKING:
    from shira.tuner.layer import ShiraLayer

SWITCH = "SHIRA_CHECK_RANKS"
"""Environment variable; ``0`` turns the automatic check off."""

Digests = dict[tuple[str, str], frozenset[str]]
"""``{(adapter, parameter): hashes}``; several where a process holds several such models."""

_new_models: list[weakref.ref[nn.Module]] = []


def check_ranks(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare the positions of every adapter of a model between processes; a collective call.

    It is made by itself at the first training forward under an initialized
    ``torch.distributed``. Call it where that cannot be: when only some ranks train, with their
    group and the environment variable ``SHIRA_CHECK_RANKS=0``.

    Args:
        model: A model with SHiRA layers, wrapped or not.
        group: The processes to compare; None means all.

    Raises:
        RankMismatchError: On every rank, if two ranks train different positions.
    """
    layers = _layers_of(model)
    compare(digests_of(layers), group)
    for layer in layers:
        layer._ranks_unchecked = False


def register_model(model: nn.Module) -> None:
    """Note a model that has got an adapter: it is checked at the first training forward."""
    _new_models[:] = [ref for ref in _new_models if ref() not in (None, model)]
    _new_models.append(weakref.ref(model))


def check_new_models(layer: ShiraLayer | None = None) -> None:
    """Check every model noted since the last check; a collective call.

    Args:
        layer: The layer whose forward is about to run. A copy of a model is not noted, so its
            layers are checked one by one.
    """
    if not _several_ranks() or os.environ.get(SWITCH) == "0":
        return
    models = [model for ref in _new_models if (model := ref()) is not None]
    layers = [found for model in models for found in _layers_of(model)]
    if layer is not None and not any(found is layer for found in layers):
        layers.append(layer)
    compare(digests_of(layers), None)
    _new_models.clear()
    for found in layers:
        found._ranks_unchecked = False


# Called by torch.compile while it traces, with no argument: so it neither breaks the graph nor adds
# a guard, and compiled blocks of equal structure go on sharing one graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def check_while_compiling() -> bool:
    """Check the new models while a training forward is being compiled."""
    if _new_models and torch.is_grad_enabled():
        check_new_models()
    return True


def digests_of(layers: Iterable[ShiraLayer]) -> Digests:
    """Hashes of the positions of all adapters of some layers. O(k)."""
    digests: Digests = {}
    for layer in layers:
        for adapter, indices in layer.shira_indices.items():
            raw = indices.detach().cpu().contiguous().numpy().tobytes()
            hashed = hashlib.blake2b(raw, digest_size=8)
            hashed.update(repr(layer.weight_shape).encode())
            key = (adapter, layer.weight_name)
            digests[key] = digests.get(key, frozenset()) | {hashed.hexdigest()}
    return digests


def compare(digests: Digests, group: dist.ProcessGroup | None) -> None:
    """Compare hashes between the processes of a group: 8 bytes from each, more if they differ.

    Raises:
        RankMismatchError: On every rank, if a parameter that two ranks have differs.
    """
    ordered = sorted((key, sorted(hashes)) for key, hashes in digests.items())
    total = hashlib.blake2b(repr(ordered).encode(), digest_size=8).hexdigest()
    if len(set(_gather(total, group))) > 1:
        raise_if_different(_gather(digests, group))


def raise_if_different(by_rank: Sequence[Digests]) -> None:
    """Raise if a parameter that two ranks have differs between them.

    A parameter that only some ranks have (stages of a pipeline) is no contradiction.

    Args:
        by_rank: The hashes of each rank.

    Raises:
        RankMismatchError: Naming adapter, parameter and ranks.
    """
    different: dict[tuple[str, str], tuple[int, int]] = {}
    first: dict[tuple[str, str], int] = {}
    for rank, digests in enumerate(by_rank):
        for key, hashes in digests.items():
            other = by_rank[first.setdefault(key, rank)][key]
            # one of them may hold a further model with parameters of this name
            if not (hashes <= other or other <= hashes):
                different.setdefault(key, (first[key], rank))
    if not different:
        return
    (adapter, parameter), (one, two) = min(different.items())
    raise RankMismatchError(
        f"adapter {adapter!r}, parameter {parameter!r}: ranks {one} and {two} train different "
        f"positions ({len(different)} of {len(first)} parameters differ). Averaging their "
        "gradients would be wrong. Give the config a random_seed, or make masks from data on one "
        "rank and send them to the others; masks that look at weights need equal weights on every "
        "rank"
    )


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group)
    return everyone


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _layers_of(model: nn.Module) -> list[ShiraLayer]:
    from shira.tuner.layer import ShiraLayer

    return [module for module in model.modules() if isinstance(module, ShiraLayer)]


_IGNORED = "_ddp_params_and_buffers_to_ignore"


def ignore_in_ddp(model: nn.Module) -> None:
    """Keep DDP from sending the positions from rank 0 to all others at every forward.

    They never change, and `check_new_models` sees to it that they are equal. Names that others put
    into the model's list stay; without SHiRA layers the list is as it was before.
    """
    names = ignored_by_ddp(model)
    if names:
        setattr(model, _IGNORED, names)
    elif _IGNORED in model.__dict__:
        delattr(model, _IGNORED)


def ignored_by_ddp(model: nn.Module) -> list[str]:
    """What others have DDP ignore in a model, and the positions of its adapters."""
    others = [name for name in model.__dict__.get(_IGNORED, ()) if ".shira_indices." not in name]
    positions = [name for name, _ in model.named_buffers() if ".shira_indices." in f".{name}"]
    return [*others, *positions]
