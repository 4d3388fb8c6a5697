# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: which one is gone on from, and which are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shira.adapter import Adapter
from shira.cli.train.checkpoints import (
    check_same,
    find_checkpoint,
    record_of,
    started,
    write_record,
)
from shira.cli.train.options import TrainOptions
from shira.delta import SparseDelta
from shira.errors import ConfigError
from shira.masks import random_support

FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "trainer_state.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
)


def test_checkpoints(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(ConfigError, match="not a whole checkpoint: there is no trainer_state"):
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
    with pytest.raises(ConfigError, match="not a whole checkpoint: "):
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


def test_a_record_holds_the_rate_that_is_taken(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("text,label\n")
    options = TrainOptions(task="causal-lm", train_file=str(tmp_path / "train.csv"))
    record = record_of(options, processes=1)
    assert record["learning_rate"] == 1e-3
    assert record_of(replace(options, optimizer="factored"), processes=1)["learning_rate"] is None
    # of before there was a choice of optimizers
    del record["optimizer"]
    (tmp_path / "shira_train.json").write_text(json.dumps(record))
    check_same(tmp_path, record_of(options, processes=1))
    assert capsys.readouterr().err == ""


def test_a_record_that_is_none_is_refused(tmp_path):
    (tmp_path / "shira_train.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="no record of settings"):
        check_same(tmp_path, {})
