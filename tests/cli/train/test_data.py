# SPDX-License-Identifier: Apache-2.0
"""A user's files: formats, columns, labels, blocks, padding."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from shira import ShiraConfig, get_peft_model
from shira.cli.train.data import collator, load_data, read_table
from shira.cli.train.model import load_base, load_tokenizer
from shira.cli.train.options import TrainOptions
from shira.errors import ConfigError

pytestmark = pytest.mark.usefixtures("workshop")


class Words:
    """A tokenizer that numbers words by their length, with a token 1 before and 2 at the end."""

    eos_token_id = 2

    def __call__(self, texts, truncation=False, max_length=None, add_special_tokens=True):
        rows = [[len(word) + 10 for word in text.split()] for text in texts]
        rows = [[1, *row] if add_special_tokens else row for row in rows]
        return {"input_ids": [row[:max_length] if truncation else row for row in rows]}

    def __reduce__(self):  # the cache of `datasets` tells encoders apart by their pickle
        return Words, ()


OPTIONS = TrainOptions(model="m", task="text-classification", output="o", max_length=8)
RUNNING = replace(OPTIONS, task="causal-lm")


def table(path, rows):
    if path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    return str(path)


ROWS = [
    {"id": 1, "Sentence": "a bb", "target": "yes"},
    {"id": 2, "Sentence": "ccc", "target": "no"},
    {"id": 3, "Sentence": "dddd e", "target": "yes"},
]


def labelled(*labels):
    return [{"text": "x", "label": label} for label in labels]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_columns_are_found_in_every_format(tmp_path, kind):
    path = table(tmp_path / f"train.{kind}", ROWS)
    data = load_data(replace(OPTIONS, train_file=path), Words())
    assert data.labels == ("no", "yes")
    assert data.train[:] == {
        "input_ids": [[1, 11, 12], [1, 13], [1, 14, 11]],
        "labels": [1, 0, 1],
    }
    assert data.evaluation is None


def test_numbers_as_labels_are_in_order_of_value(tmp_path):
    rows = [{"text": "a", "label": n} for n in (10, 9, 2, 10)]
    path = table(tmp_path / "train.jsonl", rows)
    data = load_data(replace(OPTIONS, train_file=path), Words())
    assert data.labels == ("2", "9", "10")
    assert data.train["labels"][:] == [2, 1, 0, 2]


def test_columns_that_are_named(tmp_path):
    rows = [{"text": "a", "other": "b b", "label": "x", "mine": n} for n in "uv"]
    path = table(tmp_path / "train.csv", rows)
    options = replace(OPTIONS, train_file=path, text_column="other", label_column="mine")
    data = load_data(options, Words())
    assert data.labels == ("u", "v")
    assert data.train["input_ids"][0] == [1, 11, 11]


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (ROWS, {"text_column": "sentense"}, "no column 'sentense'; there are id, Sentence, target"),
        ([{"a": "x", "label": "y"}], {}, "which column is the text? There are a, label"),
        ([{"text": "x", "b": "y"}], {}, "which column is the label?"),
        ([{"text": "x", "label": "y"}], {}, "a classifier needs two labels"),
        (labelled({"x": 1}, {"x": 2}), {}, "column 'label' holds lists, objects"),
        (labelled([1], [2]), {}, "column 'label' holds lists, objects"),
        (labelled("a", 1, [2]), {}, "column 'label' holds lists, objects"),
        (labelled("a", None, "b"), {}, "some rows have no label"),
        (labelled(None, None), {}, "some rows have no label"),
        (labelled("a", "b" * 2000), {}, "too long for a label; is it the column of the text?"),
        (labelled(1.0, float("nan"), 2.0), {}, "some rows have no label"),
        ([{"text": {"a": 1}, "label": n} for n in "xy"], {}, "column 'text' holds lists, objects"),
        ([{"text": "x", "label": n} for n in "xy"], {"eval_fraction": 1e-9}, "needs two labels"),
    ],
)
def test_columns_that_cannot_be_told(tmp_path, rows, change, message):
    path = table(tmp_path / "train.jsonl", rows)
    with pytest.raises(ConfigError) as error:
        load_data(replace(OPTIONS, train_file=path, **change), Words())
    assert message in str(error.value)


def test_a_label_that_was_not_trained_on(tmp_path):
    train = table(tmp_path / "train.csv", ROWS)
    dev = table(tmp_path / "dev.csv", [{"id": 1, "Sentence": "a", "target": "yess"}])
    with pytest.raises(ConfigError, match=r"label 'yess' does not occur.*Did you mean 'yes'"):
        load_data(replace(OPTIONS, train_file=train, eval_file=dev), Words())


@pytest.mark.parametrize("missing", ["Sentence", "target"])
def test_a_column_that_the_evaluation_data_lack(tmp_path, missing):
    train = table(tmp_path / "train.csv", ROWS)
    rows = [{key: value for key, value in row.items() if key != missing} for row in ROWS]
    dev = table(tmp_path / "dev.csv", rows)
    with pytest.raises(ConfigError, match=rf"dev.csv: there is no column '{missing}'"):
        load_data(replace(OPTIONS, train_file=train, eval_file=dev), Words())


def test_a_share_is_kept_to_evaluate_on(tmp_path):
    rows = [{"text": f"{'x' * n}", "label": n % 2} for n in range(1, 21)]
    path = table(tmp_path / "train.jsonl", rows)
    data = load_data(replace(OPTIONS, train_file=path, eval_fraction=0.25), Words())
    assert (len(data.train), len(data.evaluation)) == (15, 5)
    seen = [row["input_ids"][1] for part in (data.train, data.evaluation) for row in part]
    assert sorted(seen) == list(range(11, 31))


def test_running_text_becomes_blocks(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a bb ccc\n\ndddd\neeeee f\n")
    data = load_data(replace(RUNNING, train_file=str(path), max_length=5), Words())
    # every line begins with 1 and ends with 2; blocks of 5 go over the ends of lines
    assert data.train["input_ids"][:] == [[1, 11, 12, 13, 2], [1, 14, 2, 1, 15], [11, 2]]
    assert data.train["labels"][:] == data.train["input_ids"][:]
    assert data.labels is None


def test_only_the_completion_is_learnt(tmp_path, capsys):
    rows = [{"prompt": "a b", "completion": "cc dd"}, {"prompt": "a " * 9, "completion": "b"}]
    path = table(tmp_path / "train.jsonl", rows)
    data = load_data(replace(RUNNING, train_file=path, max_length=6), Words())
    assert data.train["input_ids"][:] == [[1, 11, 11, 12, 12, 2]]
    assert data.train["labels"][:] == [[-100, -100, -100, 12, 12, 2]]
    assert "1 of 2 rows are left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no row has a token of its completion"):
        load_data(replace(RUNNING, train_file=path, max_length=2), Words())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.xlsx", "x", "not of '.xlsx'"),
        ("train.csv", "text,label\n", "no rows"),
        ("train.jsonl", '{"text": 1}\n{"text": {"a": 1}}\nnot json', "could not be read as json"),
        ("train.csv", "", "could not be read as csv"),
        ("train.txt", "", "could not be read as text"),
        ("train.csv", b"text,label\ncaf\xe9,x\n", "could not be read as csv: 'utf-8' codec"),
        ("train.parquet", b"PAR1nonsense", "could not be read as parquet"),
        ("train.json", "[" * 100_000, "could not be read as json"),
        ("train.jsonl", '{"text":' * 3000 + "1" + "}" * 3000, "could not be read as json"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message, caplog):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_table(str(tmp_path / name))
    assert message in str(error.value)
    assert caplog.text == ""


def test_text_that_is_no_utf8(tmp_path):
    """A reader may leave that to who looks at the text."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "caf\xe9", "label": "x"}\n{"text": "b", "label": "y"}\n')
    with pytest.raises(ConfigError, match="column 'text' is no UTF-8"):
        load_data(replace(OPTIONS, train_file=str(path)), Words())


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_rows_without_text_are_said_once(tmp_path, capsys, fraction):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "a,1\nb,2\n" * 8 + "NA,2\n,1\n")
    load_data(replace(OPTIONS, train_file=str(path), eval_fraction=fraction), Words())
    assert capsys.readouterr().err.count("2 rows have no text") == 1


def test_lines_without_text(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n\n\n")
    with pytest.raises(ConfigError, match="no row has a token after its first"):
        load_data(replace(RUNNING, train_file=str(path)), Words())


def test_padding(workshop):
    tokenizer = load_tokenizer(TrainOptions(model=str(workshop / "bert")))
    assert tokenizer.pad_token_id == 0
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    pad = collator(RUNNING, tokenizer, Plain())
    assert {name: tensor.tolist() for name, tensor in pad(rows).items()} == {
        "input_ids": [[1, 2, 3], [4, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[1, 2, 3], [4, -100, -100]],
    }
    batch = collator(OPTIONS, tokenizer, Plain())([{**row, "labels": 1} for row in rows])
    assert batch["labels"].tolist() == [1, 1]


class Plain(torch.nn.Module):
    """A model that knows of no logits to keep."""

    def forward(self, input_ids, labels):
        raise NotImplementedError


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_of_prompts_are_not_computed(workshop, adapted):
    options = TrainOptions(model=str(workshop / "gpt2"), task="causal-lm")
    tokenizer = load_tokenizer(options)
    model = load_base(options, None, tokenizer.pad_token_id)
    if adapted:
        model = get_peft_model(model, ShiraConfig(r=2, target_modules="all-linear"))
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
        {"input_ids": [6, 7, 8, 9], "labels": [-100, -100, -100, 9]},
    ]
    short = collator(options, tokenizer, model)(rows)
    assert short["logits_to_keep"] == 3
    assert short["labels"].tolist() == [[-100, 4, 5], [-100, 9, -100]]
    plain = collator(options, tokenizer, Plain())(rows)
    assert "logits_to_keep" not in plain
    model.eval()
    results = []
    for batch in (short, plain):
        out = model(**batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append((out.logits[:, -3:], out.loss, *torch.autograd.grad(out.loss, trained)))
        assert out.logits.shape[1] == batch["labels"].shape[1]
    torch.testing.assert_close(*results)
