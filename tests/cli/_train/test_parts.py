# SPDX-License-Identifier: Apache-2.0
"""The small parts of a run: targets, checkpoints, warm-up, figures, the command, the plot."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from shira.cli._train.arguments import set_warmup
from shira.cli._train.card import command_line
from shira.cli._train.checkpoints import find_checkpoint
from shira.cli._train.evaluation import classification_figures
from shira.cli._train.model import parse_targets
from shira.cli._train.options import TrainOptions
from shira.cli._train.plot import plot_losses
from shira.errors import ConfigError, TargetError


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
        path = tmp_path / "checkpoints" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "trainer_state.json").touch()
    (tmp_path / "checkpoints" / "checkpoint-99").mkdir()  # broken off while it was written
    for resume in ("last", "auto"):
        assert find_checkpoint(tmp_path, resume).name == "checkpoint-10"
    fifth = tmp_path / "checkpoints" / "checkpoint-5"
    assert find_checkpoint(tmp_path, str(fifth)) == fifth


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"warmup": 0.1, "max_steps": 50}, 5),
        ({"warmup": 7.0, "max_steps": 50}, 7),
        ({"warmup": 0.0}, 0),
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
