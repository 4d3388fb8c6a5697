# SPDX-License-Identifier: Apache-2.0
"""`ShiraConfig`: PEFT's configuration of SHiRA, with every field, default and meaning, and ours."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils import PeftType
from torch import nn

from shira.errors import ConfigError, MaskError, did_you_mean
from shira.masks import MASKS
from shira.masks.block import check_options
from shira.store.patterns import check_patterns

MaskFn = Callable[..., Any]
SAVE_DTYPES = ("float32", "bfloat16", "float16")
ON_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
"""Options of loading that say where and how a file is found on the hub."""


@dataclass
class ShiraConfig(PeftConfig):
    """Configuration of a `ShiraModel`.

    Args:
        r: The budget as LoRA counts it: r * (m + n) entries of an m x n weight are trained. It does
            not bound the rank.
        mask_type: Which entries: ``random``, ``struct``, ``magnitude``, ``grad``, ``snip``,
            ``block``, ``block_diagonal`` (see `shira.masks.MASKS`), or a name of your own together
            with ``config.mask_fn = ...``:
            ``mask_fn(base_layer, r, **kwargs)`` returns a 0/1 tensor of the weight's shape with
            exactly r * (m + n) ones, or a `shira.Support`.
        random_seed: Seed of the mask. ``None`` draws one (from torch's global generator) when the
            adapter is made, and writes it here.
        target_modules: Names, or a regular expression, of the modules to adapt (``nn.Linear``,
            transformers' ``Conv1D``, ``nn.Conv2d``, ``nn.Embedding``), or ``"all-linear"``.
        fan_in_fan_out: The weight is stored ``[in, out]``, as GPT-2's ``Conv1D`` does. Known from
            the layer's type; kept for PEFT's sake.
        init_weights: Start from zeros. ``False`` starts from a normal draw: for tests.
        modules_to_save: Further modules to train and save whole.
        density: Another way to give the budget: the share of each weight's entries, in (0, 1].
            Takes the place of ``r``.
        mask_slot: For random masks of one seed: slots 0, 1, 2, ... never share an entry.
        mask_options: Options of the mask, e.g. ``{"largest": False}`` for ``magnitude``,
            ``{"block_size": 64, "score": "magnitude"}`` for ``block``.
        exclude_modules: Names, or a regular expression, of modules not to adapt.
        layers_to_transform: Adapt only the layers of these numbers.
        layers_pattern: Name of the list of layers that the numbers count.
        rank_pattern: ``{name or regular expression: r}`` for layers of another budget.
        save_dtype: Dtype in which ``save_pretrained`` stores the values: ``"bfloat16"`` or
            ``"float16"`` for half the bytes, ``"float32"``. ``None`` keeps theirs, which is what a
            training run that is to be resumed needs.
        base_fingerprint: Written by shira: a hash of the base values under each parameter's
            entries, by which loading knows a wrong base.
        shira_shapes: Written by shira: shape of each adapted weight, so that a file can be
            understood without the base model.
        fused: Written by shira: how the adapter was made of others (see `shira.fuse`).

    Raises:
        ConfigError: If a value is not possible.
    """

    r: int = field(
        default=32, metadata={"help": "r * (m + n) entries of an m x n weight are trained"}
    )
    mask_type: str = field(
        default="random", metadata={"help": f"one of {', '.join(MASKS)}, or your own mask_fn"}
    )
    random_seed: int | None = field(
        default=None, metadata={"help": "seed of the mask; None draws one and records it"}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression, or 'all-linear'"}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "the weight is stored [in, out] (Conv1D)"}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "start from zeros; False: from a normal draw, for tests"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "further modules to train and save whole"}
    )
    density: float | None = field(
        default=None, metadata={"help": "share of entries to train; takes the place of r"}
    )
    mask_slot: int = field(
        default=0, metadata={"help": "random masks of one seed in different slots never overlap"}
    )
    mask_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "options of the mask, e.g. {'largest': False}"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression not to adapt"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "adapt only the layers of these numbers"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list of layers that the numbers count"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "{name or regular expression: r}"}
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "dtype of saved values: float32, bfloat16 or float16"}
    )
    base_fingerprint: dict[str, str] | None = field(
        default=None, metadata={"help": "written by shira: hash of the base under each adapter"}
    )
    base_fingerprint_rounded: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "written by shira: the same of the base in other dtypes"}
    )
    shira_shapes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "written by shira: shape of each adapted weight"}
    )
    fused: dict[str, Any] | None = field(
        default=None, metadata={"help": "written by shira: how it was made of other adapters"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SHIRA
        self._check_budget()
        self._check_targets()
        if self.save_dtype is not None and self.save_dtype not in SAVE_DTYPES:
            raise ConfigError(
                f"save_dtype is one of {', '.join(SAVE_DTYPES)}, or None, not {self.save_dtype!r}."
                f"{did_you_mean(str(self.save_dtype), SAVE_DTYPES)}"
            )
        self.mask_fn: MaskFn | None = self._builtin_mask_fn()
        # Finds the weights that belong to this config; set by from_pretrained, used once.
        self._source: Callable[[], str | None] | None = None
        self._just_read = False  # that file was checked, or this config is to go before its own
        # Says what the adapter's positions and base decide; see `shira.tuner.describing.watch`.
        self._describe: Callable[[ShiraConfig], dict[str, Any]] | None = None

    def _check_budget(self) -> None:
        for name, value in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", v) for k, v in self._ranks()),
        ]:
            if not _is_int(value) or value <= 0:
                raise ConfigError(f"`{name}` should be a positive integer, not {value!r}")
        if self.density is not None and not (
            isinstance(self.density, (int, float))
            and math.isfinite(self.density)
            and 0 < self.density <= 1
        ):
            raise ConfigError(
                f"density is a share of entries in (0, 1], not {self.density!r}; 0.01 means 1 %"
            )
        if not _is_int(self.mask_slot) or self.mask_slot < 0:
            raise ConfigError(f"mask_slot counts from 0, and cannot be {self.mask_slot!r}")
        if self.mask_slot and self.mask_type != "random":
            raise ConfigError(f"only random masks have slots, not mask_type={self.mask_type!r}")
        if self.random_seed is not None and not _is_int(self.random_seed):
            raise ConfigError(f"random_seed is an integer or None, not {self.random_seed!r}")

    def _ranks(self) -> list[tuple[str, int]]:
        return list((self.rank_pattern or {}).items())

    def _check_targets(self) -> None:
        check_patterns(vars(self))
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        by_number = self.layers_to_transform is not None or bool(self.layers_pattern)
        if by_number and isinstance(self.target_modules, str):
            raise ConfigError(
                "layers_to_transform and layers_pattern need target_modules as a list of names; "
                "a regular expression can name the layers itself"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform")

    def _builtin_mask_fn(self) -> MaskFn | None:
        from shira.tuner.masking import BuiltinMask

        if self.mask_type in MASKS:
            self._check_options()
            return BuiltinMask(self)
        if not isinstance(self.mask_type, str):
            raise ConfigError(f"mask_type is a name, not {self.mask_type!r}")
        near = difflib.get_close_matches(self.mask_type.lower(), MASKS, n=1, cutoff=0.8)
        if near:
            raise ConfigError(
                f"unknown mask_type {self.mask_type!r}. Did you mean {near[0]!r}? "
                f"Built in are {', '.join(MASKS)}."
            )
        if not self.inference_mode:
            warnings.warn(
                f"mask_type={self.mask_type!r} is not built in (those are {', '.join(MASKS)}); "
                "supply it by `config.mask_fn = my_mask_fn`",
                stacklevel=4,
            )
        return None

    def _check_options(self) -> None:
        known = [option for option in MASKS[self.mask_type].options if option != "slot"]
        for option in self.mask_options or {}:
            if option not in known:
                raise ConfigError(
                    f"mask_type={self.mask_type!r} has no option {option!r} (it has "
                    f"{', '.join(sorted(known)) or 'none'}).{did_you_mean(option, known)}"
                )
        if "block_size" in known:
            try:
                check_options(**(self.mask_options or {}))
            except MaskError as error:
                raise ConfigError(
                    f"mask_options of mask_type={self.mask_type!r}: {error}"
                ) from None

    def draw_seed(self) -> int:
        """The seed of the mask; drawn and recorded now if there was none."""
        if self.random_seed is None:
            self.random_seed = int(torch.randint(2**31 - 1, (), device="cpu"))
        return self.random_seed

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary; what was not set of shira's own stays out of the file.

        Sets are sorted lists, so that every process writes the same file. While a model has the
        adapter, what depends on the adapter's positions and on the base is read off its layers.
        """
        return self._written({} if self._describe is None else self._describe(self))

    def to_dict_of(self, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        """Return `to_dict` for one of several adapters that share this configuration.

        A collective call where the model is sharded.

        Args:
            model: With the adapter's layers.
            adapter_name: Of the adapter.
        """
        from shira.tuner.describing import describe

        return self._written(describe(self, model, adapter_name, gather=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_describe": None}  # a copy belongs to another model, or to none

    def _written(self, described: dict[str, Any]) -> dict[str, Any]:
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in {**super().to_dict(), **described}.items()
            if not (name in _LEFT_OUT_WHEN_UNSET and value == _LEFT_OUT_WHEN_UNSET[name])
        }


_LEFT_OUT_WHEN_UNSET: dict[str, Any] = {
    "density": None,
    "mask_slot": 0,
    "mask_options": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "save_dtype": None,
    "base_fingerprint": None,
    "base_fingerprint_rounded": None,
    "shira_shapes": None,
    "fused": None,
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def weights_of(model_id: str, subfolder: str | None, kwargs: dict[str, Any]) -> str | None:
    """The safetensors file that PEFT is about to load with this config, if it can be known."""
    from huggingface_hub import hf_hub_download
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    path = os.path.join(model_id, subfolder) if subfolder is not None else model_id
    local = os.path.join(path, SAFETENSORS_WEIGHTS_NAME)
    if os.path.exists(local):
        return local
    if os.path.isdir(path):
        return None
    try:
        return str(
            hf_hub_download(
                model_id,
                SAFETENSORS_WEIGHTS_NAME,
                subfolder=subfolder,
                **{key: value for key, value in kwargs.items() if key in ON_THE_HUB},
            )
        )
    except Exception:  # PEFT will look for other files, and report what it cannot find
        return None
