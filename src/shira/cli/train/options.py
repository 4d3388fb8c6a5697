# SPDX-License-Identifier: Apache-2.0
"""The options of `shira train`: one dataclass from which command line, YAML and checks are made."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shira.cli.options import one_of
from shira.cli.output import needed_for
from shira.errors import ConfigError, did_you_mean


class Task(NamedTuple):
    """Names that a task has in PEFT and transformers."""

    task_type: str
    auto_class: str
    pipeline: str


TASKS = {
    "text-classification": Task(
        "SEQ_CLS", "AutoModelForSequenceClassification", "text-classification"
    ),
    "causal-lm": Task("CAUSAL_LM", "AutoModelForCausalLM", "text-generation"),
}
DEFAULT_DENSITY = 0.02
DEFAULT_LEARNING_RATE = 1e-3
DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "factored")
GROUPS = {  # of the help, by the first option of each
    "model": "Model",
    "train_file": "Data",
    "target_modules": "Adapter",
    "learning_rate": "Training",
    "output": "Output",
}
_LARGEST = 2**16  # bytes of a file of options
_KIND = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides a training run. An option that is None was not given."""

    model: str | None = _option(None, "Base model: a folder, or a name on the hub.")
    task: str | None = _option(None, f"One of: {', '.join(TASKS)}.")
    dtype: str = _option("auto", f"Dtype of the base weights: {', '.join(DTYPES)}.")

    train_file: str | None = _option(None, "Data to train on: csv, tsv, json, jsonl, txt, parquet.")
    eval_file: str | None = _option(None, "Data to evaluate on, in one of the same formats.")
    eval_fraction: float | None = _option(
        None, "Evaluate on this share of the training file, which is then not trained on."
    )
    text_column: str | None = _option(None, "Column of the text; found if unambiguous.")
    label_column: str | None = _option(None, "Column of the label; found if unambiguous.")
    max_length: int = _option(256, "Tokens of a text, or of a block of running text.")

    target_modules: str | None = _option(
        None, "Module names with commas, a regular expression, or all-linear (default)."
    )
    modules_to_save: str | None = _option(
        None, "Modules to train whole, with commas; a classifier's head always is."
    )
    r: int | None = _option(None, "Budget as LoRA counts it: r * (m + n) per weight.")
    density: float | None = _option(
        None, "Budget as a share of each weight; 0.02 if neither is given."
    )
    mask_type: str = _option(
        "random", "random, struct, magnitude, grad, snip, block or block_diagonal."
    )
    mask_seed: int | None = _option(None, "Seed of the mask; that of --seed if not given.")
    mask_slot: int = _option(0, "Random masks of one seed in two slots never overlap.")
    calibration_samples: int = _option(64, "Rows used to calibrate grad and snip masks.")

    learning_rate: float | None = _option(
        None, "Default 1e-3, about five times a LoRA's; with factored by the weights' norm."
    )
    optimizer: str = _option(
        "adamw", "adamw, or factored: second moments by rows and columns (FactoredAdamW)."
    )
    epochs: float = _option(3.0, "Passes over the training data.")
    max_steps: int | None = _option(None, "Optimizer steps, whatever the epochs.")
    batch_size: int = _option(8, "Batch size per device.")
    eval_batch_size: int | None = _option(None, "Batch size per device in evaluation.")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimizer step.")
    warmup: float = _option(0.05, "Steps of warm-up, or a share of all steps if below 1.")
    weight_decay: float = _option(0.0, "Pulls the deltas towards zero.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    scheduler: str = _option("linear", "linear, cosine, constant_with_warmup, ...")
    seed: int = _option(42, "Seed of head, batches, dropout and mask.")
    bf16: bool = _option(False, "Compute in bfloat16 where that is safe (autocast).")
    gradient_checkpointing: bool = _option(False, "Less memory, one more forward pass.")
    logging_steps: int = _option(10, "Optimizer steps between logged losses.")
    eval_steps: int | None = _option(
        None, "Optimizer steps between evaluations; every epoch if not given."
    )
    save_steps: int | None = _option(
        None, "Optimizer steps between checkpoints; every epoch if not given."
    )
    save_total_limit: int = _option(2, "Checkpoints to keep.")
    cpu: bool = _option(False, "Train on the CPU even if there is a GPU.")

    output: str | None = _option(None, "Folder to write; made if absent.")
    resume: str | None = _option(
        None, "Go on from a checkpoint: last, auto (last, if there is one), or its path."
    )
    overwrite: bool = _option(False, "Replace an adapter that is in --output already.")

    def filled(self) -> TrainOptions:
        """Return the options with what is taken for budget, rate, seed and targets not given.

        The rate stays None with `FactoredAdamW`, which takes it from the weights.
        """
        no_budget = self.r is None and self.density is None
        no_rate = self.learning_rate is None and self.optimizer == "adamw"
        return dataclasses.replace(
            self,
            density=DEFAULT_DENSITY if no_budget else self.density,
            learning_rate=DEFAULT_LEARNING_RATE if no_rate else self.learning_rate,
            mask_seed=self.seed if self.mask_seed is None else self.mask_seed,
            target_modules=self.target_modules or "all-linear",
        )


def fields() -> list[tuple[dataclasses.Field[Any], Any]]:
    """Return each option with its type, e.g. ``int | None``."""
    hints = typing.get_type_hints(TrainOptions)
    return [(field, hints[field.name]) for field in dataclasses.fields(TrainOptions)]


def resolve(given: Mapping[str, Any], config: Path | None) -> TrainOptions:
    """Return the options of a run, checked: those given that are not None, else of the file."""
    values = {} if config is None else _read_yaml(config)
    values.update({name: value for name, value in given.items() if value is not None})
    budgets = ("r", "density")
    if config is not None and any(given.get(name) is not None for name in budgets):
        # one budget on the command line takes the place of the other one in the file
        values = {k: v for k, v in values.items() if k not in budgets or given.get(k) is not None}
    options = TrainOptions(**values)
    _check(options)
    return options


def _read_yaml(path: Path) -> dict[str, Any]:
    with needed_for("--config", "'shira[train]'"):
        import yaml
    with path.open("rb") as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ConfigError(f"{path}: a file of options has {_LARGEST} bytes at most")
    try:
        loader = yaml.SafeLoader(raw.decode())
        root = loader.get_single_node()
        flat = root is None or _is_flat(root)
        pairs = loader.construct_pairs(root, deep=True) if root and flat else []
    except Exception as error:  # PyYAML's constructors raise more than its own errors
        raise ConfigError(f"{path}: not YAML: {str(error)[:300]}") from error
    if not flat:
        raise ConfigError(
            f"{path}: options are 'name: value' lines, not nested but for lists of names"
        )
    known = {field.name: hint for field, hint in fields()}
    values: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: an option's name is text, not a {type(key).__name__}")
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: unknown option {key!r:.100}.{did_you_mean(name, known)}")
        if name in values:
            raise ConfigError(f"{path}: option {key!r} stands there twice")
        values[name] = _converted(value, known[name], f"{path}: {key}")
    return values


def _is_flat(root: Any) -> bool:
    """Return if nothing is nested: references in references could make much of a few lines."""
    return root.id == "mapping" and all(
        part.id == "scalar"
        for _, value in root.value
        for part in (value.value if value.id == "sequence" else [value])
    )


def _converted(value: Any, hint: Any, where: str) -> Any:
    """Return a YAML value as the option's type: numbers widen, lists of names get commas."""
    hint, *optional = typing.get_args(hint) or (hint,)  # of int | None
    if value is None and optional:
        return None
    if isinstance(value, int) and value.bit_length() > 64:  # perhaps too long to be shown
        raise ConfigError(f"{where}: an integer of {value.bit_length()} bits")
    if hint is str and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ",".join(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)  # YAML reads 1e-3 as text
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: {value!r:.100} is not {_KIND[hint]}")


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _check(options: TrainOptions) -> None:
    for name in ("model", "task", "train_file", "output"):
        if not getattr(options, name):
            raise ConfigError(f"{flag(name)} is needed, here or in the file of --config")
    one_of("--task", options.task or "", TASKS)
    one_of("--dtype", options.dtype, DTYPES)
    one_of("--optimizer", options.optimizer, OPTIMIZERS)
    if options.r is not None and options.density is not None:
        raise ConfigError("--r and --density are two ways to give one budget: give one of them")
    if options.eval_file is not None and options.eval_fraction is not None:
        raise ConfigError("--eval-file and --eval-fraction both say what to evaluate on: give one")
    if options.eval_fraction is not None and not 0 < options.eval_fraction < 1:
        raise ConfigError(f"--eval-fraction is between 0 and 1, not {options.eval_fraction}")
    for name, value in vars(options).items():
        check_value(name, value)
    for name in ("train_file", "eval_file"):
        value = getattr(options, name)
        if value is not None and not Path(value).is_file():
            raise FileNotFoundError(2, "no such file", value)


_FROM_ZERO = ("seed", "warmup", "weight_decay", "max_grad_norm", "mask_slot")
_MOST = {"seed": 2**32 - 1, "density": 1.0, "epochs": 1e6}
_MOST_OF_ALL = 2**31 - 1  # of other integers, so that no library underneath overflows


def check_value(name: str, value: Any) -> None:
    """Refuse a number that is out of range or not finite, and a text that no file name can be."""
    option = flag(name)
    if isinstance(value, str):
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
            raise ConfigError(f"{option} {value!r:.100} is no text that can be the name of a file")
        return
    if isinstance(value, bool) or value is None:
        return
    if name == "mask_seed":
        if not -(2**63) <= value < 2**63:
            raise ConfigError(f"{option} is an integer of 64 bits")
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{option} is a finite number, not {value}")
    if name in _FROM_ZERO:
        if value < 0:
            raise ConfigError(f"{option} is not below 0, as {value} is")
    elif not value > 0:
        raise ConfigError(f"{option} is above 0, not {value}")
    most = _MOST.get(name, _MOST_OF_ALL if isinstance(value, int) else math.inf)
    if value > most:
        raise ConfigError(f"{option} is at most {most}, not {value}")
