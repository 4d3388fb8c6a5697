# SPDX-License-Identifier: Apache-2.0
"""The base model of a run, and the SHiRA adapter in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from shira.cli.options import one_of
from shira.cli.train.data import Data, collator, largest_token, row_lengths
from shira.cli.train.options import TASKS, TrainOptions
from shira.errors import ConfigError, TargetError, did_you_mean
from shira.masks import MASKS

_PLAIN_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


def load_tokenizer(options: TrainOptions) -> Any:
    """Return the base model's tokenizer, which pads to the right with some token in any case."""
    from transformers import AutoTokenizer

    with _loading(options, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"--model {options.model}: its tokenizer has no token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def load_base(options: TrainOptions, labels: Sequence[str] | None, pad_token_id: int) -> Any:
    """Return the base model; a classifier gets a new head, which the seed alone decides."""
    import transformers

    arguments: dict[str, Any] = {"dtype": options.dtype}
    if labels is not None:
        with _loading(options, "configuration"):
            config = transformers.AutoConfig.from_pretrained(options.model or "")
        made_for = " ".join(getattr(config, "architectures", None) or [])
        if "ForSequenceClassification" in made_for and config.num_labels != len(labels):
            shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
            raise ConfigError(
                f"--model {options.model}: its head has {config.num_labels} labels, the data has "
                f"{len(labels)} ({shown}); take the model without that head, or data of its labels"
            )
        arguments["problem_type"] = "single_label_classification"
        arguments["num_labels"] = len(labels)
        arguments["id2label"] = dict(enumerate(labels))
        arguments["label2id"] = {label: number for number, label in enumerate(labels)}
    auto_class = getattr(transformers, TASKS[options.task or ""].auto_class)
    torch.manual_seed(options.seed)
    with _loading(options, f"model for {options.task}"):
        model = auto_class.from_pretrained(options.model, **arguments)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return model


def check_modules(model: nn.Module, options: TrainOptions) -> None:
    """Refuse modules to save of which no path ends with the name: PEFT leaves such a name out."""
    paths = [path for path, _ in model.named_modules() if path]
    for name in _names(options.modules_to_save) or []:
        if not any(f"base_model.model.{path}".endswith(name) for path in paths):
            known = {*paths, *(path.rpartition(".")[2] for path in paths)}
            raise ConfigError(
                f"--modules-to-save {name}: the model has no such module."
                f"{did_you_mean(name, known)}"
            )


def check_fits(model: Any, options: TrainOptions, data: Data) -> None:
    """Refuse a model without an embedding for each token and each position of the data."""
    tables = [table for table in (data.train, data.evaluation) if table is not None]
    tokens = model.get_input_embeddings().weight.shape[0]
    if (largest := max(map(largest_token, tables))) >= tokens:
        raise ConfigError(
            f"--model {options.model}: its tokenizer gives token {largest}, and it has embeddings "
            f"of {tokens} tokens"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(int(row_lengths(table).max()) for table in tables)
    for name, module in model.named_modules():
        learnt = re.search("position|wpe", name.rpartition(".")[2])
        if learnt and isinstance(module, nn.Embedding) and isinstance(positions, int):
            most = positions - (0 if module.padding_idx is None else module.padding_idx + 1)
            if longest > most:
                raise ConfigError(
                    f"--model {options.model}: it has {most} positions, and a row has {longest} "
                    f"tokens: give --max-length {most}"
                )


def adapter_config(options: TrainOptions) -> Any:
    """Return the configuration of the adapter."""
    from shira import ShiraConfig

    one_of("--mask-type", options.mask_type, MASKS)
    options = options.filled()
    return ShiraConfig(
        **({"density": options.density} if options.r is None else {"r": options.r}),
        mask_type=options.mask_type,
        mask_slot=options.mask_slot,
        random_seed=options.mask_seed,
        target_modules=parse_targets(options.target_modules),
        modules_to_save=_names(options.modules_to_save),
        task_type=TASKS[options.task or ""].task_type,
    )


def adapt(
    model: Any, options: TrainOptions, data: Data, tokenizer: Any, device: torch.device
) -> Any:
    """Return the base with a new adapter in it; of several processes, all see the same rows."""
    from shira import calibrate, get_peft_model

    config = adapter_config(options)
    if "gradient" in MASKS[options.mask_type].needs:
        rows = data.train.shuffle(seed=options.seed)
        rows = rows.select(range(min(options.calibration_samples, len(rows))))
        pad = collator(options, tokenizer, model)
        loader = DataLoader(rows, options.batch_size, collate_fn=pad)
        batches = [batch.to(device) for batch in loader]
        config = calibrate(model.to(device), config, batches)
    return get_peft_model(model, config)


def parse_targets(text: str | None) -> str | list[str]:
    """Return names with commas as a list; ``all-linear`` and regular expressions as they are."""
    if text is None or text == "all-linear":
        return "all-linear"
    if _PLAIN_NAMES.fullmatch(text):
        return _names(text) or []
    try:
        re.compile(text)
    except re.error as error:
        raise TargetError(
            f"--target-modules {text!r} is neither names nor a regular expression: {error}"
        ) from error
    return text


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def _loading(options: TrainOptions, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file raises what its reader likes; the cause is kept
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"--model {options.model}: could not load its {what}: {first[:300]}"
        ) from error
