# SPDX-License-Identifier: Apache-2.0
"""A task of the demo: its settings, and the questions that the runner asks of it."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from shira.cli.progress import track
from shira.cli.train.data import Data
from shira.cli.train.options import TrainOptions, check_value
from shira.store.atomic import write_atomically

# In the demo's folder, beside the texts, and a folder for each adapter:
RESULTS = "demo.json"  # settings, figures and proofs
PREDICTIONS = "predictions.safetensors"  # logits as the training saw them, one tensor an adapter
REPORT = "report.html"  # the page that shows both adapters

_BATCH = 64  # texts to predict at once


@dataclass(frozen=True)
class Task(ABC):
    """Everything that decides a demo's result beside the installed files."""

    seed: int = 42
    density: float = 0.02
    mask_type: str = "random"
    steps: int = 150
    batch_size: int = 16
    optimizer: str = "adamw"
    learning_rate: float | None = 5e-3  # none: the optimizer's own
    head_learning_rate: float | None = None  # of a new head, where the base lacks one
    max_length: int = 48
    files_per_library: int = 400
    switches: int = 100

    MODEL: ClassVar[str]  # the base model, as a person calls it
    KIND: ClassVar[str]  # the task as `shira train` calls it
    QUICK: ClassVar[Mapping[str, int]]  # settings with which all is proven, but nothing learnt
    FIGURE: ClassVar[str]  # of merit, of those that an evaluation gives
    TEXTS: ClassVar[str]  # the word for the texts
    ABOUT: ClassVar[Mapping[str, str]]  # the adapters' names, and what they learn
    RUNS: ClassVar[Mapping[str, str]]  # before and after, in words
    FAST_REPORT: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_value(name, value)

    @abstractmethod
    def write_texts(self, root: Path) -> dict[str, Any]:
        """Write the texts; return ``tasks``, the adapters' names, and what `data` has to know."""

    @abstractmethod
    def data(self, root: Path, name: str, tokenizer: Any, facts: Mapping[str, Any]) -> Data:
        """Return the encoded rows of an adapter."""

    @abstractmethod
    def queries(self, root: Path, name: str) -> list[str]:
        """Return the texts that two processes must give the same answers to."""

    @abstractmethod
    def note(self, name: str, facts: Mapping[str, Any]) -> str:
        """Return what to know of the figures of an adapter."""

    def shown(self, figure: float, rows: int) -> str:
        """Return a loss to read, or the accuracy of so many rows with its standard error."""
        if self.FIGURE == "loss":
            return f"{figure:.3f}"
        return f"{figure:.1%} (+- {math.sqrt(figure * (1 - figure) / max(rows, 1)):.1%})"

    def answers(self, model: Any, tokenizer: Any) -> dict[str, str]:
        """Return what the model answers to the prompts that a person reads, if there are some."""
        return {}

    def options(self, model: Path | str, slot: int = 0) -> TrainOptions:
        """Return the options of ``shira train`` for an adapter, which has this mask slot."""
        return TrainOptions(
            model=str(model),
            task=self.KIND,
            dtype="float32",
            max_length=self.max_length,
            density=self.density,
            mask_type=self.mask_type,
            mask_slot=slot if self.mask_type == "random" else 0,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            max_steps=self.steps,
            batch_size=self.batch_size,
            eval_batch_size=16,
            warmup=min(max(1, self.steps // 16), self.steps - 1),
            seed=self.seed,
            logging_steps=max(1, self.steps // 20),
            cpu=True,  # small enough, and the proofs compare bits between two processes
        )

    @torch.no_grad()
    def predict(self, model: Any, tokenizer: Any, root: Path, name: str, what: str) -> Tensor:
        """Return the logits of each query, of its last token: float32 ``(queries, outputs)``."""
        model.eval()
        texts, made = self.queries(root, name), []
        last = {"logits_to_keep": 1} if self.KIND == "causal-lm" else {}
        for start in track(range(0, len(texts), _BATCH), f"{name}: predicting {what}"):
            batch = tokenizer(
                texts[start : start + _BATCH],
                padding=True,
                padding_side="left" if self.KIND == "causal-lm" else "right",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            logits = model(**batch, **last).logits.float()
            made.append(logits if logits.dim() == 2 else logits[:, -1])
        return torch.cat(made)


def head_labels(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return labels for the head that all adapters share, so that one base fits them all."""
    return tuple(map(str, range(facts["outputs"]))) if "outputs" in facts else None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
