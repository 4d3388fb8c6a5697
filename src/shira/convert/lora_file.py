# SPDX-License-Identifier: Apache-2.0
"""Reading a LoRA in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

What is read is the plain LoRA of linear layers and embeddings, ``scaling * B A``, with
``rank_pattern``, ``alpha_pattern`` and rsLoRA as PEFT applies them. A variant whose update is
something else (DoRA and others), a base that PEFT changes on loading (PiSSA and others), and
convolutions are refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.errors import AdapterError, ConfigError, FileFormatError, WrongBaseError
from shira.store.config import CONFIG_LIMIT
from shira.store.header import FLOATS, TensorFile, check_values, open_tensors, refusing
from shira.store.json_text import open_regular, read_object
from shira.store.names import CONFIG_NAME, WEIGHTS_NAME, base_module_name, weight_name
from shira.store.patterns import check_patterns, matching
from shira.store.peft import read_whole

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_FACTOR = re.compile(r"(.*)\.(?:lora_[AB]\.weight|(lora_embedding_)[AB])", re.DOTALL)

# Config fields whose update is not scaling * B A, with what they are called.
_OTHER_UPDATES = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "LoRA with a bias",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA of parameters (target_parameters)",
    "layer_replication": "LoRA of replicated layers",
}
# Ways to start that change the base's weights, unless saving has undone them.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class Factors:
    """The LoRA of one weight.

    Attributes:
        name: The base model's own name of the weight.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scaling: Factor on the product: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        transposed: Whether the weight is stored as ``[in, out]`` (Conv1D, embeddings), not as
            ``[out, in]``.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float = 1.0
    transposed: bool = False

    def __post_init__(self) -> None:
        shapes = f"A {tuple(self.a.shape)} and B {tuple(self.b.shape)}"
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise AdapterError(f"{self.name!r}: {shapes} are not (r, in) and (out, r)")
        if not (self.a.is_floating_point() and self.b.is_floating_point()):
            raise AdapterError(f"{self.name!r}: {self.a.dtype} and {self.b.dtype} are not floats")
        if not abs(self.scaling) <= torch.finfo(torch.float32).max:
            raise AdapterError(f"{self.name!r}: a scaling of {self.scaling:.3g} is beyond float32")

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as it is stored."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.transposed else (out, inner)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return ``(rows, r)`` and ``(r, cols)`` in float32, or float64 if A or B is."""
        wide = accumulation_dtype(self.a.dtype, self.b.dtype)
        a, b = self.a.detach().cpu().to(wide), self.b.detach().cpu().to(wide)
        return (a.t(), b.t()) if self.transposed else (b, a)


def is_lora(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path looks like a LoRA in PEFT's format; nothing is validated."""
    try:
        with open_regular(Path(path) / CONFIG_NAME) as file:
            return re.search(rb'"peft_type"\s*:\s*"LORA"', file.read(CONFIG_LIMIT)) is not None
    except (OSError, FileFormatError):
        return False


def read_lora(
    path: str | os.PathLike[str],
) -> tuple[list[Factors], dict[str, Any], dict[str, Tensor]]:
    """Read a LoRA.

    Args:
        path: Its folder.

    Returns:
        Factors of each weight, the config, and the whole tensors beside them by the base model's
        own names: ``modules_to_save``, and copies of the base's weights that the LoRA changes,
        which PEFT saves beside adapted embeddings.

    Raises:
        FileNotFoundError: If the folder or one of its files is not there.
        FileFormatError: If one of them is damaged, or no LoRA.
        AdapterError: If it is a variant that is not ``scaling * B A``, or a convolution's.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    with open_tensors(weights) as file:
        modules, others = _sort_out(file)
        if not modules:
            raise FileFormatError(f"{weights}: not a LoRA: no tensor is a {_LINEAR[0]}")
        fields = {field: config.get(field) for field in ("rank_pattern", "alpha_pattern")}
        try:
            for names in (None, [base_module_name(key) for key in modules]):
                check_patterns(fields, names)
        except ConfigError as error:
            raise FileFormatError(f"{folder / CONFIG_NAME}: {error}") from error
        factors = [
            _factors(file, config, key, embedding) for key, embedding in sorted(modules.items())
        ]
        whole, copies = read_whole(file, others, {one.name for one in factors})
    return factors, config, whole | copies


def oriented(
    factors: Sequence[Factors],
    shapes: Mapping[str, Sequence[int]],
    where: str,
    *,
    turn: bool = True,
) -> list[Factors]:
    """Check the shapes of weights, and turn each of the factors as its weight is stored.

    PEFT goes by the type of the layer, and the config may not tell (it is written as the user gave
    it): a Conv1D stores its weight transposed. A weight that is not square tells by its shape; a
    square one is taken as the others are.
    """
    turned, squares = {}, []
    for one in factors:
        shape = tuple(shapes[one.name])
        if shape != one.shape and not (turn and shape == one.shape[::-1]):
            raise WrongBaseError(
                f"{where}: {one.name!r} has shape {shape}, but the LoRA is of one of {one.shape}"
            )
        if shape[0] == shape[1]:
            squares.append(one.name)
        else:
            turned[one.name] = shape != one.shape
    ways = set(turned.values())
    if len(ways) > 1 and squares:
        raise AdapterError(
            f"{where}: some weights are stored as [out, in] and others as [in, out], and the "
            f"square {squares[0]!r} does not tell; give fan_in_fan_out in {CONFIG_NAME}"
        )
    return [
        replace(one, transposed=not one.transposed) if turned.get(one.name, True in ways) else one
        for one in factors
    ]


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path, "config", CONFIG_LIMIT)
    if config.get("peft_type") != "LORA":
        raise FileFormatError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for field, called in _OTHER_UPDATES.items():
        if config.get(field):
            raise AdapterError(
                f"{path}: {called} ({field}) is not supported: its update is not scaling * B A"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's weights: the update "
            "is not one of the original base. Save it with PEFT's conversion to a plain LoRA "
            "(path_initial_model_for_weight_conversion) first"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(_is_number(n) for n in patterns.values()):
            raise FileFormatError(f"{path}: {field} maps patterns to numbers")
    for field in ("r", "lora_alpha"):
        if not _is_number(config.get(field)):
            raise FileFormatError(f"{path}: {field} is a number, not {config.get(field)!r}")
    return config


def _sort_out(file: TensorFile) -> tuple[dict[str, bool], list[str]]:
    """Return the adapted modules' keys, with whether they are embeddings, and other tensors."""
    modules: dict[str, bool] = {}
    others = []
    for name in file.tensors:
        if found := _FACTOR.fullmatch(name):
            key, embedding = found[1], found[2] is not None
            for twin in _EMBEDDING if embedding else _LINEAR:
                if f"{key}.{twin}" not in file.tensors:
                    raise FileFormatError(f"{file.path}: missing tensor '{key}.{twin}'")
            modules[key] = embedding
        elif "lora_magnitude_vector" in name or name.endswith(".lora_B.bias"):
            raise AdapterError(
                f"{file.path}: {name!r} is not supported: the update is not scaling * B A"
            )
        else:
            others.append(name)
    return modules, others


def _factors(file: TensorFile, config: Mapping[str, Any], key: str, embedding: bool) -> Factors:
    names = [f"{key}.{kind}" for kind in (_EMBEDDING if embedding else _LINEAR)]
    for name in names:
        info = file.tensors[name]
        if len(info.shape) > 2:
            raise AdapterError(
                f"{file.path}: {name!r} has shape {info.shape}: LoRA of a convolution is not "
                "supported; leave such modules out of its target_modules"
            )
        if info.dtype not in FLOATS:
            raise FileFormatError(f"{file.path}: {name!r} has dtype {info.dtype}, not a float")
    a, b = (file.read(name) for name in names)
    for name, tensor in zip(names, (a, b), strict=True):
        with refusing(file.path, repr(name)):
            check_values(tensor)
    module = base_module_name(key)
    r = matching(config.get("rank_pattern"), module, config["r"])
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != r or b.shape[1] != r:
        raise FileFormatError(
            f"{file.path}: {key!r}: A {tuple(a.shape)} and B {tuple(b.shape)} are not of the "
            f"config's rank {r}"
        )
    alpha = matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return Factors(weight_name(module), a, b, scaling, transposed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
