# SPDX-License-Identifier: Apache-2.0
"""A user's files as rows of token ids: reading, finding columns, encoding, batching.

Files are read through ``datasets``, which keeps rows on disk: they may be larger than memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shira.cli.progress import say
from shira.cli.train.options import TrainOptions
from shira.errors import ConfigError, did_you_mean

READERS = {
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".txt", ".text"), "text"),
    ".parquet": "parquet",
}
TEXT_NAMES = ("text", "sentence", "content", "body", "document", "review", "question", "utterance")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "intent", "tag")
PROMPT, COMPLETION = "prompt", "completion"
IGNORED = -100  # a label that the loss leaves out
_SCALARS = ("string", "large_string", "int", "uint", "float", "double", "bool", "null")
_LONGEST_LABEL = 1000  # characters


@dataclass(frozen=True)
class Data:
    """Rows of ``input_ids`` and ``labels`` (a class's number, or tokens); class names in order."""

    train: Any
    evaluation: Any | None
    labels: tuple[str, ...] | None


def load_data(options: TrainOptions, tokenizer: Any) -> Data:
    """Read and encode the files of a run."""
    files = [path for path in (options.train_file, options.eval_file) if path is not None]
    parts = [(read_table(path), path) for path in files]
    if options.eval_fraction is not None:
        table = parts[0][0]
        try:
            split = table.train_test_split(test_size=options.eval_fraction, seed=options.seed)
        except ValueError as error:  # one of the two would be empty
            raise ConfigError(
                f"--eval-fraction {options.eval_fraction} of {len(table)} rows: {str(error)[:300]}"
            ) from error
        parts = [(split["train"], files[0]), (split["test"], files[0])]
    encode = _encode_labelled if options.task == "text-classification" else _encode_running
    (train, *evaluation), labels = encode(parts, options, tokenizer)
    return Data(train, evaluation[0] if evaluation else None, labels)


def read_table(path: str) -> Any:
    """Read a file as a ``datasets.Dataset``."""
    from datasets import load_dataset
    from datasets.utils import logging

    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise ConfigError(f"{path}: a file of {', '.join(READERS)} is needed, not of {suffix!r}")
    reader, options = READERS[suffix], {"delimiter": "\t"} if suffix == ".tsv" else {}
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it tells of an error, and then raises it
    try:
        table = load_dataset(reader, data_files=path, split="train", **options)
    except Exception as error:  # readers raise what they like; the cause is kept
        cause = str(error.__cause__ or error)
        if "corresponds to no data" in cause:  # how `datasets` puts it
            raise ConfigError(f"{path}: no rows") from error
        raise ConfigError(f"{path}: could not be read as {reader}: {cause[:300]}") from error
    finally:
        logging.set_verbosity(level)
    if not len(table):
        raise ConfigError(f"{path}: no rows")
    return table


def column(table: Any, wanted: str | None, usual: Sequence[str], *, what: str, path: str) -> str:
    """Return the name of a column: the one wanted, else the first usual one that is there."""
    names: list[str] = table.column_names
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if wanted is not None and wanted not in names:
        raise ConfigError(
            f"{path}: there is no column {wanted!r}; there are {listed}."
            f"{did_you_mean(wanted, names)}"
        )
    by_lower_name = {name.lower(): name for name in names}
    found = (by_lower_name[name] for name in usual if name in by_lower_name)
    name = next(found, None) if wanted is None else wanted
    if name is None:
        raise ConfigError(
            f"{path}: which column is the {what}? There are {listed}; say --{what}-column"
        )
    kind = str(getattr(table.features[name], "dtype", "object"))
    if not kind.startswith(_SCALARS):
        raise ConfigError(
            f"{path}: column {name!r} holds lists, objects or other values ({kind}), and the "
            f"{what} is text or a number"
        )
    try:
        table.data[name].validate(full=True)  # some readers leave that to who looks at the text
    except ValueError as error:
        raise ConfigError(f"{path}: column {name!r} is no UTF-8: {str(error)[:200]}") from error
    return name


def _encode_labelled(
    parts: Sequence[tuple[Any, str]], options: TrainOptions, tokenizer: Any
) -> tuple[list[Any], tuple[str, ...]]:
    train, path = parts[0]
    label = column(train, options.label_column, LABEL_NAMES, what="label", path=path)
    text = column(train, options.text_column, TEXT_NAMES, what="text", path=path)
    names = _class_names(train.unique(label), f"{path}: column {label!r}")
    numbers = {name: number for number, name in enumerate(names)}

    def encode(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        ids = tokenizer(_texts(rows[text]), truncation=True, max_length=options.max_length)
        return {"input_ids": ids["input_ids"], "labels": [numbers[str(v)] for v in rows[label]]}

    encoded: list[Any] = []
    for table, where in parts:
        for name in (text, label):
            column(table, name, (), what=name, path=where)
        if strange := sorted({str(value) for value in table.unique(label)} - set(names)):
            raise ConfigError(
                f"{where}: label {strange[0]!r} does not occur in what is trained on, where there "
                f"are {', '.join(names[:20])}.{did_you_mean(strange[0], names)}"
            )
        if (where != path or not encoded) and (missing := table.data[text].null_count):
            say(f"{where}: {missing} rows have no text, and are taken as empty (NA is none in csv)")
        encoded.append(_mapped(table, encode))
        if not (lengths := row_lengths(encoded[-1])).all():
            raise ConfigError(f"{where}: row {int(lengths.argmin()) + 1} has no text")
    return encoded, names


def _class_names(values: Iterable[Any], where: str) -> tuple[str, ...]:
    """Return distinct labels as text: numbers by value, others in alphabetical order."""
    distinct = set(values)
    if None in distinct or any(value != value for value in distinct):  # NaN
        raise ConfigError(f"{where}: some rows have no label")
    if longest := next((value for value in distinct if len(str(value)) > _LONGEST_LABEL), None):
        raise ConfigError(
            f"{where}: {str(longest)[:60]!r}... is too long for a label; is it the column of the "
            "text?"
        )
    if len(distinct) < 2:
        raise ConfigError(f"{where}: a classifier needs two labels, here all are {distinct}")
    if all(isinstance(value, int) for value in distinct):
        return tuple(map(str, sorted(distinct)))
    return tuple(sorted(map(str, distinct)))


def _encode_running(
    parts: Sequence[tuple[Any, str]], options: TrainOptions, tokenizer: Any
) -> tuple[list[Any], None]:
    train, path = parts[0]
    pairs = {PROMPT, COMPLETION} <= set(train.column_names) and options.text_column is None
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not pairs:
        text = column(train, options.text_column, TEXT_NAMES, what="text", path=path)

    def encode_pairs(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        heads = tokenizer(_texts(rows[PROMPT]))["input_ids"]
        tails = tokenizer(_texts(rows[COMPLETION]), add_special_tokens=False)["input_ids"]
        ids, labels = [], []
        for head, tail in zip(heads, tails, strict=True):
            row = [*head, *tail, *end][: options.max_length]
            learnt = [IGNORED] * min(len(head), len(row)) + row[len(head) :]
            if any(label != IGNORED for label in learnt[1:]):  # the first token is never predicted
                ids.append(row)
                labels.append(learnt)
        return {"input_ids": ids, "labels": labels}

    def encode_blocks(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [value for value in _texts(rows[text]) if value]
        encoded = tokenizer(texts)["input_ids"] if texts else []
        run = [token for ids in encoded for token in [*ids, *end]]
        size = options.max_length
        blocks = [run[at : at + size] for at in range(0, len(run), size)]
        blocks = [block for block in blocks if len(block) > 1]  # one token predicts nothing
        return {"input_ids": blocks, "labels": blocks}

    encoded = []
    for table, where in parts:
        for needed in (PROMPT, COMPLETION) if pairs else (text,):
            column(table, needed, (), what=needed, path=where)
        encoded.append(rows := _mapped(table, encode_pairs if pairs else encode_blocks))
        if not len(rows):
            what = "of its completion within --max-length" if pairs else "after its first"
            raise ConfigError(f"{where}: no row has a token {what}, so there is none to learn")
        if pairs and len(rows) < len(table):
            say(
                f"{where}: {len(table) - len(rows)} of {len(table)} rows are left out: no token "
                f"of their completion is within --max-length {options.max_length}"
            )
    return encoded, None


def row_lengths(table: Any) -> Any:
    """Count the tokens of each row of an encoded table: integers ``(rows,)`` in numpy."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(table.data["input_ids"]).to_numpy()


def largest_token(table: Any) -> int:
    """Return the largest token id in an encoded table."""
    import pyarrow.compute

    tokens = pyarrow.compute.list_flatten(table.data["input_ids"])
    return int(pyarrow.compute.max(tokens).as_py())


def _mapped(table: Any, encode: Any) -> Any:
    return table.map(encode, batched=True, remove_columns=table.column_names)


def _texts(values: Sequence[Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values]


def collator(options: TrainOptions, tokenizer: Any, model: Any) -> Any:
    """Return the function that pads rows to the longest; it shows a Trainer no tokenizer to save.

    For a language model whose forward takes ``logits_to_keep``, logits are computed from the first
    label of the batch on.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if options.task == "text-classification":
        return partial(DataCollatorWithPadding(tokenizer))
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    return partial(_pad_running, pad, keeps)


def _pad_running(pad: Any, keeps: bool, rows: Sequence[Mapping[str, Any]]) -> Any:
    batch = pad(rows)
    labels = batch["labels"]
    before = int((labels != IGNORED).any(0).int().argmax()) - 1  # predicts the first label
    if keeps and before > 0:
        batch["labels"] = labels[:, before:]
        batch["logits_to_keep"] = labels.shape[1] - before
    return batch
