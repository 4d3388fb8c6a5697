# SPDX-License-Identifier: Apache-2.0
"""Rows of trainers: who computes the gradient and makes the step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.reach.case import STEPS, Case, row, trained
from tests.tuner.models import MLP, llama

KIND = "Trainers"
Loss = Callable[[], Tensor]


def trained_by(train: Callable[[nn.Module, Loss], None]) -> Case:
    """A case of a small network and another way to train it."""
    x = torch.randn(16, 8)
    targets = {"target_modules": ["lin1", "lin2"]}
    return Case(MLP, lambda model: model(x), targets, train=train)


def with_optimizer(make: Callable[[list[Tensor]], Any]) -> Case:
    """A case of another optimizer, made from the parameters."""

    def train(model: nn.Module, loss: Loss) -> None:
        optimizer = make(trained(model))
        for _ in range(STEPS):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

    return trained_by(train)


@row(KIND, "a loop of one's own")
def loop() -> Case:
    return with_optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=3e-2))


@row(KIND, "SGD")
def sgd() -> Case:
    return with_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))


@row(KIND, "transformers' `Trainer`")
def trainer() -> Case:
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(0, 64, (8, 8))

    def train(model: nn.Module, loss: Loss) -> None:
        class OnTheLoss(Trainer):
            def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
                return loss()

        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"output_dir": folder, "max_steps": STEPS, "use_cpu": True}
            options |= {"learning_rate": 3e-2, "report_to": [], "save_strategy": "no"}
            rows = [{"input_ids": one, "labels": one} for one in ids]
            arguments = TrainingArguments(disable_tqdm=True, **options)
            OnTheLoss(model, arguments, train_dataset=rows).train()

    targets = {"target_modules": ["q_proj", "v_proj"]}
    return Case(llama, lambda model: model(ids).logits, targets, train=train)


@row(KIND, "`torch.compile` of the model")
def compiled() -> Case:
    def train(model: nn.Module, loss: Loss) -> None:
        optimizer = torch.optim.AdamW(trained(model), lr=3e-2)
        model.compile(backend="aot_eager")
        for _ in range(STEPS):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        model._compiled_call_impl = None

    return trained_by(train)
