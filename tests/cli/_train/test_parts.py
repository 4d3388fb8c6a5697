# SPDX-License-Identifier: Apache-2.0
"""The small parts of a run: targets, checkpoints, warm-up, figures, the command, the plot."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shira.adapter import Adapter
from shira.cli._train.arguments import set_warmup
from shira.cli._train.card import command_line
from shira.cli._train.checkpoints import (
    check_same,
    find_checkpoint,
    record_of,
    started,
    write_record,
)
from shira.cli._train.evaluation import classification_figures
from shira.cli._train.model import parse_targets
from shira.cli._train.options import TrainOptions
from shira.cli._train.plot import plot_losses
from shira.delta import SparseDelta
from shira.errors import ConfigError, TargetError
from shira.masks import random_support

FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "trainer_state.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("layers.0.q,layers.1.q", ["layers.0.q", "layers.1.q"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"layers\.\d{1,2}\.q", r"layers\.\d{1,2}\.q"),
    ],
)
def test_targets(text, targets):
    assert parse_targets(text) == targets


def test_targets_that_are_neither():
    with pytest.raises(TargetError, match="neither names nor a regular expression"):
        parse_targets("layers.(q")


def test_checkpoints(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(ConfigError, match="no checkpoint"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path))
    for step in (5, 10, 9):
        whole_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{step}")
    for resume in ("last", "auto"):
        assert find_checkpoint(tmp_path, resume).name == "checkpoint-10"
    fifth = tmp_path / "checkpoints" / "checkpoint-5"
    assert find_checkpoint(tmp_path, str(fifth)) == fifth


def whole_checkpoint(path, value=1):
    support = random_support((4, 6), 5, seed=0)
    Adapter({"fc.weight": SparseDelta(support, torch.ones(5))}).save(path, format="peft")
    file = path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.mul_(value)
    save_file(tensors, file, metadata)
    (path / "trainer_state.json").write_text('{"global_step": 5}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(100)}, path / name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, lambda raw: raw[: len(raw) // 2]) for name in FILES),
        *((name, lambda raw: raw[:-3]) for name in FILES),
        *((name, None) for name in FILES),
        ("optimizer.pt", lambda raw: raw.replace(bytes(400), bytes(399) + b"x", 1)),
        ("adapter_model.safetensors", "nan"),
    ],
)
@pytest.mark.parametrize("resume", ["last", "auto"])
def test_a_checkpoint_cut_short_gives_way_to_the_one_before(tmp_path, capsys, name, change, resume):
    for step in (5, 10):
        whole_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{step}")
    last = tmp_path / "checkpoints" / "checkpoint-10"
    if change is None:
        (last / name).unlink()
    elif change == "nan":
        shutil.rmtree(last)
        whole_checkpoint(last, value=float("nan"))
    else:
        (last / name).write_bytes(change((last / name).read_bytes()))
    assert find_checkpoint(tmp_path, resume).name == "checkpoint-5"
    said = capsys.readouterr().err
    assert "checkpoint-10 is not whole (" in said
    assert "going on from checkpoint-5" in said
    if (last / "trainer_state.json").is_file():
        with pytest.raises(ConfigError, match="the checkpoint is not whole"):
            find_checkpoint(tmp_path, str(last))
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-5")
    with pytest.raises(ConfigError, match="there is no whole checkpoint"):
        find_checkpoint(tmp_path, resume)


@pytest.mark.parametrize(
    ("change", "refused", "said"),
    [
        ({}, None, ""),
        ({"epochs": 9.0, "learning_rate": 0.5}, None, "--epochs 3.0, now 9.0"),
        ({"save_steps": 7, "output": "other", "resume": "last"}, None, ""),
        ({"density": 0.02, "mask_seed": 42, "target_modules": "all-linear"}, None, ""),
        *(
            ({name: value}, f"--{name.replace('_', '-')} ", "")
            for name, value in (
                *(("r", 3), ("density", 0.1), ("seed", 7), ("mask_seed", 7), ("mask_slot", 1)),
                *(("mask_type", "snip"), ("target_modules", "q"), ("modules_to_save", "head")),
                *(("max_length", 9), ("eval_fraction", 0.5), ("label_column", "b")),
            )
        ),
        ("another file", "training data", ""),
    ],
)
def test_a_checkpoint_of_other_settings(tmp_path, capsys, change, refused, said):
    (tmp_path / "train.csv").write_text("text,label\n")
    options = TrainOptions(task="causal-lm", train_file=str(tmp_path / "train.csv"))
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    record = record_of(options, processes=1)
    check_same(checkpoint, record)
    assert "not compared" in capsys.readouterr().err
    (checkpoint / "shira_train.json").write_text(json.dumps(record))
    if change == "another file":
        (tmp_path / "train.csv").write_text("text,label\nmore,1\n")
        change = {}
    now = record_of(replace(options, **change), processes=1)
    if refused is None:
        check_same(checkpoint, now)
        err = capsys.readouterr().err
        assert said in err if said else err == ""
    else:
        with pytest.raises(ConfigError, match=f"checkpoint-5 was made with .*{refused}"):
            check_same(checkpoint, now)


def test_a_checkpoint_of_an_earlier_run_is_not_the_last(tmp_path):
    """Though it is of a later step; of before there were records, all are earlier."""
    (tmp_path / "train.csv").write_text("text,label\n")
    options = TrainOptions(task="causal-lm", train_file=str(tmp_path / "train.csv"))
    record = record_of(options, processes=1)
    for step, since in ((30, None), (20, 100.0), (5, 200.0), (10, 200.0)):
        path = tmp_path / "checkpoints" / f"checkpoint-{step}"
        whole_checkpoint(path)
        if since is not None:
            write_record(path, record, since)
    assert find_checkpoint(tmp_path, "last").name == "checkpoint-10"
    assert started(tmp_path / "checkpoints" / "checkpoint-5") == 200.0
    (tmp_path / "checkpoints" / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    assert find_checkpoint(tmp_path, "last").name == "checkpoint-5"


def test_a_record_that_is_none_is_refused(tmp_path):
    (tmp_path / "shira_train.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="no record of settings"):
        check_same(tmp_path, {})


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"warmup": 0.1, "max_steps": 50}, 5),
        ({"warmup": 7.0, "max_steps": 50}, 7),
        ({"warmup": 0.0}, 0),
        ({"max_steps": 1}, 0),  # its one step would have a rate of 0
        # 100 rows in steps of 4 x 2 on 2 processes, twice over
        ({"warmup": 0.5, "batch_size": 4, "gradient_accumulation_steps": 2, "epochs": 2.0}, 7),
    ],
)
def test_warmup(options, steps):
    arguments = SimpleNamespace(world_size=2, warmup_steps=None)
    set_warmup(arguments, TrainOptions(**options), rows=100)
    assert arguments.warmup_steps == steps


def test_classification_figures():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 3, size=50)
    found = classification_figures(SimpleNamespace(predictions=logits, label_ids=labels))
    said = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, said))
    expected = sklearn.f1_score(labels, said, labels=range(4), average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)


def test_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shira", "train", "--model", "a b", "--r", "4"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command_line() == "shira train --model 'a b' --r 4"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    start = "torchrun --nnodes 2 --nproc-per-node 2 -m shira train"
    assert command_line().startswith(start)


def test_plot(tmp_path):
    assert not plot_losses([{"step": 3, "train_runtime": 1.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    assert plot_losses(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
