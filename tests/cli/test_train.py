# SPDX-License-Identifier: Apache-2.0
"""`shira train` on tiny random models: what it learns, writes, resumes, refuses."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version

import pytest
import torch
import yaml

from shira import Adapter, Switch
from shira.cli.train.checkpoints import WRITTEN


@pytest.fixture
def classify(workshop, tmp_path):
    return [
        *("train", "--model", workshop / "bert", "--task", "text-classification"),
        *("--train-file", workshop / "train.csv", "--eval-file", workshop / "dev.csv"),
        *("--density", 0.2, "--learning-rate", 3e-2, "--max-length", 16, "--batch-size", 16),
        *("--output", tmp_path / "out"),
    ]


@pytest.fixture
def write(workshop, tmp_path):
    """Arguments to train a language model."""
    return [
        *("train", "--model", workshop / "gpt2", "--task", "causal-lm"),
        *("--train-file", workshop / "train.txt", "--max-length", 16, "--batch-size", 4),
        *("--density", 0.2, "--learning-rate", 1e-2, "--output", tmp_path / "out"),
    ]


def test_classification_from_end_to_end(shira, classify, workshop, tmp_path):
    answer = shira(*classify, "--epochs", 12, "--target-modules", "query,value,dense")
    assert answer.status == 0, answer.err
    assert answer.out.isascii()
    assert answer.err.isascii()
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {*WRITTEN, "checkpoints"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] > 0.9  # the words that tell are few
    assert metrics["rows"] == {"train": 96, "evaluation": 32}
    assert metrics["steps"] == 72
    assert json.loads((out / "labels.json").read_text()) == ["no", "yes"]
    adapter = Adapter.load(out)
    assert adapter.density == pytest.approx(0.2, rel=0.01)
    assert any(".query." in name for name in adapter)
    assert not any(".key." in name for name in adapter)

    # the adapter on disk predicts what the figures say
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from shira import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(workshop / "bert", num_labels=2)
    model = PeftModel.from_pretrained(base, out).eval()
    tokenizer = AutoTokenizer.from_pretrained(workshop / "bert")
    lines = (workshop / "dev.csv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split(",") for line in lines), strict=True)
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    said = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    right = [("no", "yes")[i] == label for i, label in zip(said.argmax(1), labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(metrics["after"]["accuracy"])

    # and so does the base with adapter and head switched in, or merged on disk
    load = AutoModelForSequenceClassification.from_pretrained
    plain, places = load(workshop / "bert", num_labels=2).eval(), (tmp_path / "b", tmp_path / "m")
    plain.save_pretrained(places[0])
    switch = Switch(plain)
    switch.load("trained", out)
    switch.activate("trained")
    assert shira("merge", out, "--base", places[0], "--output", places[1]).status == 0
    for found in (plain, load(places[1]).eval()):
        logits = found(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        assert torch.equal(logits.logits, said)


def test_the_model_card(shira, classify, workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shira", *map(str, classify), "--max-steps", "2"])
    assert shira(*classify, "--max-steps", 2).status == 0
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == str(workshop / "bert")
    assert head["library_name"] == "peft"
    accuracy = json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]["accuracy"]
    for words in (
        *("`train.csv`: 96 rows", "`dev.csv`: 32 rows", "2 labels: `no`, `yes`", "density 0.2"),
        *(f"{accuracy:.4g}", f"torch {version('torch')}", "![loss](loss.png)"),
        f"shira train --model {workshop / 'bert'}",
    ):
        assert words in card


@pytest.mark.parametrize("optimizer", ["adamw", "factored"])
def test_resuming_gives_what_an_unbroken_run_gives(shira, write, tmp_path, optimizer):
    write = [*write, "--optimizer", optimizer]
    assert shira(*write, "--max-steps", 6, "--save-steps", 3).status == 0
    out = tmp_path / "out"
    assert not list(out.rglob("tokenizer*"))  # in no checkpoint either: it would be most of it
    unbroken = Adapter.load(out)
    # as if it had been killed while it wrote the last checkpoint
    cut = out / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:100])
    for path in out.glob("adapter_*"):
        path.unlink()
    answer = shira(*write, "--max-steps", 6, "--save-steps", 3, "--resume", "last")
    assert answer.status == 0, answer.err
    assert "checkpoint-6 is not whole (optimizer.pt is damaged" in answer.err
    assert "going on from checkpoint-3" in answer.err
    resumed = Adapter.load(out)
    assert json.loads((out / "metrics.json").read_text())["steps"] == 6
    assert resumed == unbroken

    other = ["--optimizer", {"adamw": "factored", "factored": "adamw"}[optimizer]]
    for more in (["--density", 0.1], ["--seed", 7], ["--mask-type", "struct"], other):
        answer = shira(*write, "--max-steps", 6, "--resume", "last", *more)
        assert answer.status == 2
        assert f"checkpoint-6 was made with {more[0]}" in answer.err.splitlines()[-1]
    assert Adapter.load(out) == unbroken


def test_the_rate_of_the_factored_optimizer_goes_by_the_weights(shira, write, tmp_path):
    write = write[: write.index("--learning-rate")] + write[write.index("--output") :]
    steps = ["--max-steps", 8, "--logging-steps", 1, "--scheduler", "constant", "--warmup", 0]
    assert shira(*write, *steps, "--optimizer", "factored").status == 0
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    rates = {line["learning_rate"] for line in history if "learning_rate" in line}
    assert len(rates) == 1
    assert rates != {1e-3}
    answer = shira(*write, *steps, "--optimizer", "factorized", "--overwrite")
    assert answer.status == 2
    assert "Did you mean 'factored'" in answer.err


def test_a_run_that_ends_in_no_number_writes_no_adapter(shira, write, tmp_path):
    out = tmp_path / "out"
    wild = ["--dtype", "float16", "--learning-rate", 1e4, "--max-steps", 6, "--logging-steps", 9]
    answer = shira(*write, *wild)
    assert answer.status == 2
    assert re.search(r"error: the loss was not finite .* at step \d", answer.err.splitlines()[-1])
    assert not out.exists()
    assert answer.out == ""
    assert shira(*write, "--max-steps", 1).status == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert shira(*write, *wild, "--overwrite").status == 2
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_data_that_does_not_fit_the_model(shira, classify, write, tmp_path):
    three = tmp_path / "three.csv"
    three.write_text("text,label\nthe film,a\nthe book,b\nthe meal,c\n")
    answer = shira(*classify, "--train-file", three, "--eval-file", three)
    assert answer.status == 2
    assert "its head has 2 labels, the data has 3 (a, b, c)" in answer.err.splitlines()[-1]
    answer = shira(*write, "--max-length", 40)
    assert answer.status == 2
    assert "it has 32 positions, and a row has 40 tokens" in answer.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_job_file_with_the_command_line_over_it(shira, write, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text("r: 1\nmask-type: struct\nmax-steps: 9\nmask_seed: 5\n")
    arguments = [a for i, a in enumerate(write) if "--density" not in write[max(i - 1, 0) : i + 1]]
    answer = shira(*arguments, "--config", job, "--max-steps", 1, "--mask-type", "magnitude")
    assert answer.status == 0, answer.err
    out = tmp_path / "out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["mask_type"], config["random_seed"]) == (1, "magnitude", 5)
    assert json.loads((out / "metrics.json").read_text())["steps"] == 1
    # what was resolved can be run again
    again = yaml.safe_load((out / "train.yaml").read_text())
    assert (again["r"], again["max_steps"], again["mask_type"]) == (1, 1, "magnitude")
    assert shira("train", "--config", out / "train.yaml", "--overwrite").status == 0


@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_masks_from_gradients(shira, write, tmp_path, mask):
    options = ["--max-steps", 1, "--mask-type", mask, "--calibration-samples", 8]
    answer = shira(*write, *options, "--bf16", "--gradient-checkpointing")
    assert answer.status == 0, answer.err
    chosen = Adapter.load(tmp_path / "out")
    assert chosen.metadata["mask_type"] == mask
    assert shira(*write, "--max-steps", 1, "--overwrite").status == 0
    random = Adapter.load(tmp_path / "out")
    assert any(chosen[name].support != random[name].support for name in random)


def test_a_language_model_says_before_and_after(shira, write, workshop, tmp_path):
    train = [*write, "--eval-file", workshop / "dev.txt", "--epochs", 3, "--logging-steps", 2]
    answer = shira(*train)
    assert answer.status == 0, answer.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"]["perplexity"] < 0.8 * metrics["before"]["perplexity"]
    assert "before: loss" in answer.out
    assert "after: loss" in answer.out
    assert [line["loss"] for line in metrics["history"] if "loss" in line]


def test_prompts_and_completions(shira, write, workshop, tmp_path):
    arguments = [workshop / "train.jsonl" if a == workshop / "train.txt" else a for a in write]
    assert shira(*arguments, "--max-steps", 1).status == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]["train"] == 96


def test_mistakes_are_one_line_and_write_nothing(shira, write, tmp_path):
    for more, words in (
        (["--target-modules", "q_proj"], "q_proj"),
        (["--mask-type", "randm"], "Did you mean 'random'"),
        (
            ["--modules-to-save", "ln_f,lm_haed"],
            "error: --modules-to-save lm_haed: the model has no such module. "
            "Did you mean 'lm_head'?",
        ),
        (["--scheduler", "cosin"], "Did you mean 'cosine'"),
        (["--scheduler", "warmup_stable_decay"], "--scheduler is one of linear"),  # needs arguments
        (["--scheduler", "reduce_lr_on_plateau"], "give --eval-file or --eval-fraction"),
        (["--model", tmp_path / "nowhere"], "could not load its tokenizer"),
        (["--train-file", tmp_path / "none.txt"], "no such file"),
        (["--resume", "last"], "no whole checkpoint"),
        (["--density", 2], "density"),
        (["--epochs", "inf"], "--epochs"),
        (["--seed", -1], "--seed"),
        (["--output", write[write.index("--train-file") + 1]], "cannot be replaced by a folder"),
    ):
        answer = shira(*write, *more, "--max-steps", 1)
        assert answer.status == 2, more
        line = answer.err.splitlines()[-1]
        assert line.startswith("error: ")
        assert words in line
        assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_written_over_unasked(shira, write, tmp_path):
    assert shira(*write, "--max-steps", 1).status == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    answer = shira(*write, "--max-steps", 2)
    assert answer.status == 2
    assert "--overwrite" in answer.err
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
