# SPDX-License-Identifier: Apache-2.0
"""A training whose loss, or whose values, are no numbers ends with an error that says when."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments

from shira.cli.train.options import TrainOptions
from shira.cli.train.trainer import CheckedTrainer, classification_figures, set_warmup
from shira.errors import ShiraError


class Model(nn.Module):
    """Loses the mean of a batch; the gradient of row `bad_gradient` is not finite."""

    def __init__(self, bad_gradient=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.bad_gradient = bad_gradient

    def forward(self, x, number):
        loss = (self.weight * x).mean()
        if self.bad_gradient is not None and (number == self.bad_gradient).any():
            loss = loss + torch.sqrt(self.weight * 0).sum()  # 0, with an infinite slope times 0
        return {"loss": loss}


def train(folder, losses, model=None, **options):
    rows = [{"x": torch.full((3,), value), "number": n} for n, value in enumerate(losses)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(rows) // options.get("gradient_accumulation_steps", 1),
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    trainer = CheckedTrainer(
        model=model or Model(),
        args=arguments,
        train_dataset=rows,
    )
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return trainer


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD)
def test_the_step_is_said_and_nothing_is_saved_from_there_on(tmp_path, bad):
    losses = [1.0, 2.0, bad, 1.0, 1.0, 1.0]
    with pytest.raises(ShiraError, match=r"not finite .* at step 3\."):
        train(tmp_path, losses, save_strategy="steps", save_steps=2, logging_steps=100)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("position", range(4))
def test_each_step_counts_the_last_too(tmp_path, position):
    losses = [1.0] * 4
    losses[position] = float("nan")
    with pytest.raises(ShiraError, match=f"at step {position + 1}"):
        train(tmp_path, losses, save_strategy="no", logging_steps=100)


def test_steps_of_several_passes(tmp_path):
    losses = [1.0, 1.0, 1.0, float("nan"), 1.0, 1.0]
    with pytest.raises(ShiraError, match="at step 2"):
        train(tmp_path, losses, save_strategy="no", gradient_accumulation_steps=2)


def test_values_that_are_not_finite_though_the_loss_was(tmp_path):
    with pytest.raises(ShiraError, match=r"weight was not finite .* after step 4"):
        train(tmp_path, [1.0] * 4, Model(bad_gradient=3), save_strategy="no", logging_steps=100)


@pytest.mark.parametrize("library", ["torch.save", "safetensors.torch.save_file"])
def test_a_full_disk_is_said(tmp_path, monkeypatch, library):
    def full(*args, **kwargs):
        kind = RuntimeError if library == "torch.save" else SafetensorError
        raise kind("unexpected pos 512 vs 400")

    monkeypatch.setattr(library, full)
    with pytest.raises(ShiraError, match=r"the checkpoint of step 2 could not .* vs 400\. --resum"):
        train(tmp_path, [1.0] * 3, save_strategy="steps", save_steps=2)


def test_a_training_that_goes_well(tmp_path):
    trainer = train(tmp_path, [1.0, 2.0, 3.0], save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 3
    assert (tmp_path / "checkpoint-3").is_dir()


def test_classification_figures():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 3, size=50)
    found = classification_figures(SimpleNamespace(predictions=logits, label_ids=labels))
    said = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, said))
    expected = sklearn.f1_score(labels, said, labels=range(4), average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)


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
