# SPDX-License-Identifier: Apache-2.0
"""The command in the model card, and the plot."""

from __future__ import annotations

import sys

from shira.cli.train.outputs import command_line, plot_losses


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
