# SPDX-License-Identifier: Apache-2.0
"""A SHiRA adapter of a model as a LoRA, for engines that know LoRA alone.

What PEFT's ``convert_to_lora`` and ``save_as_lora`` do for a model of ours. The delta of a layer
has a high rank, so a LoRA of rank r is an approximation: the best one, by the singular values
(Eckart and Young), and the energy that it keeps is said. A delta is made dense one layer at a time,
of the rows and columns that have entries: a block mask costs what its blocks span.
"""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from tqdm import tqdm

from shira.errors import AdapterError, ConfigError, TargetError, UnknownAdapterError, listed
from shira.store.names import INDICES, VALUES, base_module_name, is_sharded, weight_name
from shira.support import matrix_shape
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import Convolution
from shira.tuner.saving import layers_of, tied_weights
from shira.tuner.targets import name_exactly

COPIED = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "base_model_name_or_path", "revision", "task_type"),
)
"""Fields of the configuration that are the LoRA's too."""
LOSSLESS = 1 - 1e-6
"""Share of the energy from which nothing is said: the rest is rounding."""


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the LoRA that is nearest to a SHiRA adapter, as PEFT's function of this name.

    Modules that are trained whole beside it go along. A factor that was set (`set_scale`) is in the
    LoRA, whose own scaling is 1.

    Args:
        model: A model with the adapter.
        rank: The rank of each layer's LoRA; a float is the share of each layer's energy (its
            squared deltas) to keep, by the smallest rank that does.
        adapter_name: The adapter.
        progressbar: Show progress.
        compile_kwargs: Of `torch.compile` for what converts a layer; None leaves it uncompiled.

    Returns:
        The configuration and the state dict, with PEFT's names.

    Raises:
        ConfigError: If the rank is not possible.
        UnknownAdapterError: If the model has no such adapter.
        TargetError: If a layer is of a type that LoRA has no plain factors for.
        AdapterError: If this process has a part of the values only, or two methods adapt the model.
    """
    number = isinstance(rank, (int, float)) and not isinstance(rank, bool)
    if not number or not 0 < rank <= (1 if isinstance(rank, float) else math.inf):
        raise ConfigError(
            f"rank is a whole number from 1 on, or a share above 0 to 1, not {rank!r}"
        )
    layers = layers_of(model, adapter_name)
    _check(model, adapter_name, layers)
    convert = layer_to_lora
    if compile_kwargs is not None:
        convert = torch.compile(layer_to_lora, **compile_kwargs)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    energies: list[tuple[str, float, float]] = []
    for path, layer in tqdm(layers.items(), disable=not progressbar, desc="Converting to LoRA"):
        a, b, energy, kept = convert(layer, rank, adapter_name)
        names = ("lora_A.weight", "lora_B.weight")
        if isinstance(layer.get_base_layer(), nn.Embedding):
            names = ("lora_embedding_A", "lora_embedding_B")
        state |= {f"{path}.{name}": factor for name, factor in zip(names, (a, b), strict=True)}
        name = base_module_name(path)
        ranks[name] = len(a)
        energies.append((name, energy, kept))
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    state |= {k: t for k, t in saved.items() if not k.endswith((f".{VALUES}", f".{INDICES}"))}
    _say(adapter_name, ranks, energies)
    return _config(model, adapter_name, ranks), state


@torch.no_grad()
def layer_to_lora(
    layer: Any, rank: float, adapter_name: str
) -> tuple[Tensor, Tensor, float, float]:
    """Return a layer's A ``(r, in)`` and B ``(out, r)``, its energy, and how much of it they keep.

    Of a convolution A is ``(r, in, *kernel)`` and B ``(out, r / groups, 1, ...)``: in PEFT's LoRA
    of one in groups, each group has an equal part of the rank, and A sees the input of all.
    """
    values = layer._delta(adapter_name).detach()
    rows, cols = (half.long() for half in layer.shira_indices[adapter_name])
    groups: int = getattr(layer.get_base_layer(), "groups", 1)
    shape = matrix_shape(layer.weight_shape)
    height, width = shape[0] // groups, shape[1]  # of a group
    if not isinstance(rank, float):
        _check_rank(layer.weight_name, int(rank), groups, height, width)
    if not bool(values.isfinite().all()):
        raise AdapterError(f"{layer.weight_name}: adapter {adapter_name!r} has values not finite")
    ends = torch.searchsorted(rows, torch.arange(groups + 1, device=rows.device) * height)
    parts = [
        _decomposed(rows[first:last] - group * height, cols[first:last], values[first:last])
        for group, (first, last) in enumerate(pairwise(ends.tolist()))
    ]
    energies = nn.utils.rnn.pad_sequence([part.s for part in parts]).double().square().sum(1)
    if not isinstance(rank, float):
        each = int(rank) // groups
    else:  # the smallest rank that keeps the share; 1 of an untrained adapter
        reached = energies.cumsum(0) >= rank * energies.sum()
        each = int((~reached).sum().clamp_max(max(len(energies) - 1, 0))) + 1
    left = values.new_zeros(shape[0], each, dtype=torch.float32)
    right = left.new_zeros(groups * each, groups * width)
    for group, (u, s, vh, used_rows, used_cols) in enumerate(parts):
        n = min(each, len(s))
        left[used_rows + group * height, :n] = u[:, :n] * s[:n]
        right[group * each : group * each + n, used_cols + group * width] = vh[:n]
    a, b = (left.t(), right.t()) if layer.fan_in_fan_out else (right, left)
    if len(layer.weight_shape) > 2:
        a = a.reshape(len(a), -1, *layer.weight_shape[2:])
        b = b.reshape(*b.shape, *(1 for _ in layer.weight_shape[2:]))
    factors = a.to(values.dtype).contiguous(), b.to(values.dtype).contiguous()
    return *factors, float(energies.sum()), float(energies[:each].sum())


class _Decomposed(NamedTuple):
    """The singular values and vectors of the rows and columns of a matrix that have entries."""

    u: Tensor
    s: Tensor
    vh: Tensor
    rows: Tensor
    cols: Tensor


def _decomposed(rows: Tensor, cols: Tensor, values: Tensor) -> _Decomposed:
    used_rows, row = rows.unique(return_inverse=True)
    used_cols, col = cols.unique(return_inverse=True)
    dense = torch.zeros(len(used_rows), len(used_cols), device=values.device)
    dense[row, col] = values.float()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return _Decomposed(u, s, vh, used_rows, used_cols)


def _check_rank(name: str, rank: int, groups: int, height: int, width: int) -> None:
    if rank % groups:
        raise ConfigError(
            f"{name}: PEFT's LoRA of a convolution in {groups} groups has a rank that is a "
            f"multiple of {groups}, not {rank}; choose such a rank, or a share of the energy"
        )
    if rank > groups * min(height, width):
        of = f"{groups} groups of {height} x {width} have" if groups > 1 else ""
        raise ConfigError(
            f"{name}: a LoRA of rank {rank} is larger than the "
            f"{of or f'{height} x {width} weight has'} room for; choose a rank up to "
            f"{groups * min(height, width)}, or a share of the energy"
        )


def _check(model: nn.Module, adapter_name: str, layers: dict[str, ShiraLayer]) -> None:
    if not layers:
        raise UnknownAdapterError(f"the model has no SHiRA adapter {adapter_name!r}")
    for path, layer in layers.items():
        if not layer.supports_lora_conversion(adapter_name):
            why = layer.no_lora() if isinstance(layer, Convolution) else "has no plain factors"
            raise TargetError(
                f"{base_module_name(path)}: PEFT's LoRA cannot hold the adapter of this "
                f"{type(layer.get_base_layer()).__name__}: it {why}. Leave it out of "
                "target_modules, or serve the merged model"
            )
        if is_sharded(layer.shira_weight[adapter_name]):
            raise AdapterError(
                f"{layer.weight_name}: this process has a part of adapter {adapter_name!r} only; "
                "save it, load it into a model in one process, and convert it there"
            )
    inputs: Any = getattr(model, "get_input_embeddings", lambda: None)()
    for module in model.modules():
        owner: Any = getattr(module, "tied_to", None)
        if owner in layers.values() and not (owner is inputs and _is_linear(module)):
            raise TargetError(
                f"{owner.weight_name!r} is adapted in all modules that share the weight, and LoRA "
                "ties no others than an input embedding and its head; serve the merged model"
            )
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ShiraLayer)
    ]
    if others:
        raise AdapterError(
            f"{listed(map(base_module_name, others))}: adapted by another method than SHiRA, which "
            f"a LoRA made of adapter {adapter_name!r} would leave out; delete it or merge it first"
        )


def _is_linear(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), nn.Linear)


def _say(
    adapter_name: str, ranks: dict[str, int], energies: list[tuple[str, float, float]]
) -> None:
    whole = math.fsum(energy for _, energy, _ in energies)
    share = math.fsum(kept for *_, kept in energies) / whole if whole else 1.0
    if share >= LOSSLESS:
        return
    name, energy, kept = min(energies, key=lambda told: told[2] / told[1] if told[1] else 1.0)
    low, high = min(ranks.values()), max(ranks.values())
    told = f"rank {high}" if low == high else f"ranks {low} to {high}"
    warnings.warn(
        f"the LoRA of {told} keeps {share:.1%} of the squared deltas of SHiRA adapter "
        f"{adapter_name!r}; least, {kept / energy:.1%}, in {name!r}",
        stacklevel=5,
    )


def _config(model: nn.Module, adapter_name: str, ranks: dict[str, int]) -> LoraConfig:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: Any = getattr(model, "peft_config", {})
    ours = configs.get(adapter_name) or ShiraConfig()
    r = max(ranks.values())
    pattern: dict[str, int] = {}
    if min(ranks.values()) < r:
        # PEFT takes the first name that ends a module's: longer ones go before those that end them
        pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    fields: dict[str, Any] = {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    fields |= {name: copy.copy(getattr(ours, name, None)) for name in COPIED}
    fields["ensure_weight_tying"] = bool(tied_weights(inner, layers_of(inner, adapter_name)))
    config = LoraConfig(r=r, lora_alpha=r, inference_mode=True, **fields)
    name_exactly(config, inner, {weight_name(name) for name in ranks})
    return config
