# SPDX-License-Identifier: Apache-2.0
"""`ShiraConfig`: PEFT's configuration of SHiRA, with every field, default and meaning, and ours."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.shira.config import ShiraConfig as StockConfig
from peft.tuners.shira.mask_functions import random_mask
from peft.utils import PeftType
from torch import Tensor, nn

from shira.errors import ConfigError, MaskError, did_you_mean
from shira.masks import MASKS, budget, budget_from_density, choose
from shira.store.names import full_shape, is_parameter, stack_of
from shira.store.patterns import check_patterns, matching
from shira.support import Support, matrix_shape
from shira.tuner.base_layer import Layer, base_of, readable, weight_of
from shira.tuner.quantized import unpacked
from shira.tuner.token_rows import checked_tokens

SAVE_DTYPES = ("float32", "bfloat16", "float16")


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
            transformers' ``Conv1D``, torch's convolutions, ``nn.Embedding``,
            ``nn.MultiheadAttention``), or ``"all-linear"``.
        fan_in_fan_out: The weight is stored ``[in, out]``, as GPT-2's ``Conv1D`` does. Known from
            the layer's type; kept for PEFT's sake.
        init_weights: Start from zeros. ``False`` starts from a normal draw: for tests.
        modules_to_save: Further modules to train and save whole.
        trainable_token_indices: Tokens whose rows of the embedding are trained whole, such as new
            ones: a list, or ``{name of the embedding: list}``. A head with the same weight sees
            them too.
        ensure_weight_tying: A target whose weight other modules share (tied embeddings) is adapted
            once, for all of them. ``False`` adapts that module alone.
        density: Another way to give the budget: the share of each weight's entries, in (0, 1].
            Takes the place of ``r``.
        mask_slot: For random masks of one seed: slots 0, 1, 2, ... never share an entry.
        mask_options: Options of the mask, e.g. ``{"largest": False}`` for ``magnitude``,
            ``{"block_size": 64, "score": "magnitude"}`` for ``block``.
        target_parameters: Names of parameters to adapt beside the modules, as PEFT's `LoraConfig`
            has them: ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``. One of three
            dimensions is a stack of matrices, as the experts of a mixture ``[experts, out, in]``:
            each has ``r * (m + n)`` entries and a mask of its own. With ``target_modules=[]``
            nothing else is adapted; left out, the model's own default targets are too.
        exclude_modules: Names, or a regular expression, of modules not to adapt; parameters that
            ``target_parameters`` names are adapted all the same, as in PEFT's LoRA.
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
        tied_weights: Written by shira: ``{parameter name: that of the parameter it is one with}``.
        fused: Written by shira: how the adapter was made of others (see `shira.fuse`).

    Raises:
        ConfigError: If a value is not possible.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    target_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    density: float | None = None
    mask_slot: int = 0
    mask_options: dict[str, Any] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    save_dtype: str | None = None
    target_parameters: list[str] | None = None
    base_fingerprint: dict[str, str] | None = None
    base_fingerprint_rounded: dict[str, list[str]] | None = None
    shira_shapes: dict[str, list[int]] | None = None
    tied_weights: dict[str, str] | None = None
    fused: dict[str, Any] | None = None

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
        self.mask_fn: Callable[..., Any] | None = self._builtin_mask_fn()
        # Finds the weights that belong to this config; set by from_pretrained, used once.
        self._source: Callable[[], str | None] | None = None
        self._where: tuple[str, str | None] | None = None  # folder and subfolder it is read from
        self._just_read: Any = None  # where it was checked; True: it goes before a file's own
        # Once a model has the adapter: `shira.tuner.saving.describe`, and what it is called with.
        self._describe: Callable[..., dict[str, Any]] | None = None
        self._described: tuple[weakref.ref[nn.Module], str, Mapping[str, Any]] | None = None

    def _check_budget(self) -> None:
        ranks = {f"rank_pattern[{name!r}]": r for name, r in (self.rank_pattern or {}).items()}
        for name, value in {"r": self.r, **ranks}.items():
            if not _is_int(value) or value <= 0:
                raise ConfigError(f"`{name}` should be a positive integer, not {value!r}")
        number = isinstance(self.density, (int, float))
        if self.density is not None and not (number and 0 < self.density <= 1):
            raise ConfigError(
                f"density is a share of entries in (0, 1], not {self.density!r}; 0.01 means 1 %"
            )
        if not _is_int(self.mask_slot) or self.mask_slot < 0:
            raise ConfigError(f"mask_slot counts from 0, and cannot be {self.mask_slot!r}")
        if self.mask_slot and self.mask_type != "random":
            raise ConfigError(f"only random masks have slots, not mask_type={self.mask_type!r}")
        if self.random_seed is not None and not _is_int(self.random_seed):
            raise ConfigError(f"random_seed is an integer or None, not {self.random_seed!r}")

    def _check_targets(self) -> None:
        check_patterns(vars(self))
        self.trainable_token_indices = checked_tokens(self.trainable_token_indices)
        if isinstance(names := self.target_parameters, (str, bytes)) or (
            names is not None and not all(isinstance(name, str) for name in names)
        ):
            raise ConfigError(
                f"`target_parameters` must be a list of strings or None, not {names!r}"
            )
        if names is not None:
            self.target_parameters = sorted(set(names))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), (list, tuple)):
                setattr(self, name, set(names))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "layers_to_transform and layers_pattern need target_modules as a list of names; "
                "a regular expression can name the layers itself"
            )

    def _builtin_mask_fn(self) -> Callable[..., Any] | None:
        if self.mask_type in MASKS:
            options = self.mask_options or {}
            if "slot" in options:
                raise ConfigError("the slot of a random mask is mask_slot, no option of the mask")
            MASKS[self.mask_type].check(options)
            return self.builtin_mask
        if not isinstance(self.mask_type, str):
            raise ConfigError(f"mask_type is a name, not {self.mask_type!r}")
        if near := difflib.get_close_matches(self.mask_type.lower(), MASKS, n=1, cutoff=0.8):
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

    def builtin_mask(self, base_layer: Layer, r: int, *, name: str = "", **_: Any) -> Support:
        """Return the built-in mask of a layer, as ``mask_fn``; errors as `shira.masks.choose`."""
        shape, looks = full_shape(weight_of(base_layer)), "weight" in self.mask_needs
        layer = base_of(base_layer)
        with readable(layer) if looks else nullcontext():
            # a packed weight is dequantized for as long as it is looked at
            weight = unpacked(layer) if looks else None
            if looks and weight is None:
                raise MaskError(
                    f"{name}: the mask is chosen by the weight's values, but they are quantized in "
                    "a way that cannot be unpacked; choose by position: mask_type 'random', "
                    "'struct', 'block' or 'block_diagonal'"
                )
            k, matrices = self.entries(shape, r, name), self._stack(name, shape)[0]
            options: dict[str, Any] = {"slot": self.mask_slot, **(self.mask_options or {})}
            options |= {"weight": weight, "seed": self.draw_seed(), "name": name}
            return choose(self.mask_type, shape, k, matrices=matrices, **options)

    def choose_by_gradient(self, name: str, weight: Tensor, gradient: Tensor) -> Support:
        """Return the mask of a weight whose accumulated gradient is known, for `calibrate`."""
        shape = tuple(gradient.shape)
        k, matrices = self.entries(shape, self.rank_of(name), name), self._stack(name, shape)[0]
        options: dict[str, Any] = {"weight": weight, "gradient": gradient, "name": name}
        options |= self.mask_options or {}
        return choose(self.mask_type, shape, k, matrices=matrices, **options).to("cpu")

    def _stack(self, name: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        return stack_of(name, shape, self.target_parameters)

    def draw_seed(self) -> int:
        """Return the seed of the mask; drawn and recorded now if there was none."""
        if self.random_seed is None:
            self.random_seed = int(torch.randint(2**31 - 1, (), device="cpu"))
        return self.random_seed

    @property
    def ties_or_tokens(self) -> bool:
        """Return whether weights are adapted otherwise than module by module, as targets name."""
        return self.ensure_weight_tying or self.trainable_token_indices is not None

    @property
    def mask_needs(self) -> frozenset[str]:
        """Return what a built-in mask looks at beside the shape: ``"weight"``, ``"gradient"``."""
        spec = MASKS.get(self.mask_type)
        return frozenset() if spec is None else spec.needs_with(self.mask_options)

    def rank_of(self, name: str) -> int:
        """Return the r of a parameter of the base model: that of the first pattern, else ``r``.

        Patterns are of its module; of one that ``target_parameters`` names, of itself.
        """
        return matching(self.rank_pattern, self._ranked(name), self.r)

    def has_rank(self, name: str, pattern: str) -> bool:
        """Return whether a pattern of `rank_pattern` is for a parameter of the base model."""
        return matching({pattern: True}, self._ranked(name), False)

    def _ranked(self, name: str) -> str:
        itself = is_parameter(name, self.target_parameters)
        return name if itself else name.removesuffix(".weight")

    def entries(self, shape: tuple[int, ...], r: int, name: str) -> int:
        """Return the budget k of a weight: from ``density`` if given, else r * (m + n).

        Of a stack of matrices that is each one's budget, times their number.

        Args:
            shape: Of the weight as stored.
            r: Its rank.
            name: The parameter's, for messages.

        Raises:
            MaskError: If the weight has fewer entries.
        """
        matrices, one = self._stack(name, shape)
        rows, cols = matrix_shape(one)
        if self.density is not None:
            return matrices * budget_from_density(rows * cols, self.density, name=name)
        try:
            return matrices * budget(rows, cols, r, name=name)
        except MaskError as error:
            largest, module = rows * cols // max(1, rows + cols), name.removesuffix(".weight")
            tail = module.rpartition(".")[2]
            layer = module if tail.isdigit() else tail
            own = f". Give it its own rank, rank_pattern={{{layer!r}: {largest}}}, or a density"
            advice = f"or leave the layer out: exclude_modules=[{layer!r}]"
            if is_parameter(name, self.target_parameters):
                advice = "or leave it out of target_parameters"
            raise MaskError(f"{error}{own if largest else ''}, {advice}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary; what was not set of shira's own stays out of the file.

        Sets are sorted lists, so that every process writes the same file. While a model has the
        adapter, what depends on the adapter's positions and on the base is read off its layers.
        """
        model, *of = self._described or (lambda: None,)
        return self._written(model(), *of)

    def to_dict_of(self, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        """Return `to_dict` for one of several adapters that share this configuration.

        A collective call where the model is sharded.

        Args:
            model: With the adapter's layers.
            adapter_name: Of the adapter.
        """
        return self._written(model, adapter_name, gather=True)

    def _written(self, model: nn.Module | None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        fields = super().to_dict()
        if model is not None and self._describe is not None:
            fields |= self._describe(self, model, *args, **kwargs)
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in fields.items()
            if name not in _OURS or value != _OURS[name]
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_described": None}  # a copy is of another model, or of none


_OURS: dict[str, Any] = {
    field.name: {} if field.name == "rank_pattern" else field.default
    for field in dataclasses.fields(ShiraConfig)
    if field.name not in {stock.name for stock in dataclasses.fields(StockConfig)}
}
"""The fields that PEFT does not know, with their defaults."""


def as_ours(config: Any) -> ShiraConfig:
    """Return one of PEFT's own configurations, made before shira was imported, as ours."""
    if isinstance(config, ShiraConfig) or not isinstance(config, StockConfig):
        return config  # type: ignore[no-any-return]
    known = {field.name for field in dataclasses.fields(ShiraConfig) if field.init}
    values = {name: value for name, value in vars(config).items() if name in known}
    ours = ShiraConfig(**values | {"inference_mode": True})  # no second warning of an own mask
    ours.inference_mode = config.inference_mode
    if config.mask_fn is not None and config.mask_fn is not random_mask:
        ours.mask_fn = config.mask_fn
    return ours


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
