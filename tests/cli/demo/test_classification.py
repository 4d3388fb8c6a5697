# SPDX-License-Identifier: Apache-2.0
"""Tasks made of docstrings: balanced, without overlap between the splits, decided by the seed."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest

from shira.cli.demo.classification import Demo, label_names
from shira.cli.demo.docstrings import KINDS, Docstring, collect

SOME = ("numpy", "standard library", "sympy")


@pytest.fixture(scope="module")
def real():
    """Docstrings of a few real files."""
    return collect(seed=3, files_per_library=60, libraries=SOME)


class Split(NamedTuple):
    name: str
    labels: tuple[str, ...]
    train: list[Docstring]
    test: list[Docstring]

    def answer(self, doc):
        return self.labels.index(getattr(doc, self.name))


def build(docstrings, **sizes):
    demo = Demo(**{"seed": 3, "train_per_label": 12, "test_per_label": 6, **sizes})
    labels = label_names(docstrings)
    return [Split(name, labels[name], *demo.split(docstrings, name)) for name in labels]


def test_deterministic(real):
    assert build(real) == build(real)
    assert build(real, seed=4) != build(real)


def test_no_source_file_and_no_text_in_both_splits(real):
    for task in build(real):
        train, test = task.train, task.test
        assert train
        assert test
        assert not {e.source for e in train} & {e.source for e in test}
        texts = [example.text for example in (*train, *test)]
        assert len(texts) == len(set(texts))
    # one rule for both tasks: what one trains on, the other does not test on
    splits = [({e.source for e in t.train}, {e.source for e in t.test}) for t in build(real)]
    assert not splits[0][0] & splits[1][1]
    assert not splits[1][0] & splits[0][1]


def test_balanced_over_the_labels(real):
    library, kind = build(real)
    assert library.labels == ("standard library", "numpy", "sympy")
    assert kind.labels == KINDS
    for task in (library, kind):
        for examples in (task.train, task.test):
            counts = Counter(map(task.answer, examples))
            assert set(counts) == set(range(len(task.labels)))
            assert len(set(counts.values())) == 1
    assert Counter(map(library.answer, library.train))[0] == 12


def test_labels_are_true(real):
    library, kind = build(real)
    for doc in library.train:
        assert library.labels[library.answer(doc)] == doc.library == doc.source.partition("/")[0]
    assert all(kind.labels[kind.answer(doc)] == doc.kind for doc in kind.test)


def test_the_rarest_label_sets_the_size():
    docstrings = [
        Docstring(f"text number {i} of {kind}", "torch", kind, f"torch/{i}.py")
        for kind in KINDS
        for i in range(4 if kind == "property" else 40)
    ]
    _, kind = build(docstrings, test_per_label=12)
    for examples in (kind.train, kind.test):
        assert set(Counter(map(kind.answer, examples)).values()) <= {1, 2, 3}


def test_one_file_does_not_make_up_a_class():
    docstrings = [
        Docstring(f"text number {i} of {kind}", "torch", kind, "torch/same.py")
        for kind in KINDS
        for i in range(30)
    ]
    _, kind = build(docstrings, train_per_label=30)
    split = kind.train or kind.test
    assert set(Counter(map(kind.answer, split)).values()) == {8}
