# SPDX-License-Identifier: Apache-2.0
"""The tasks: balanced, without overlap between the splits, decided by the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest

from shira.cli._demo.docstrings import KINDS, Docstring
from shira.cli._demo.tasks import build_tasks, collect, split_of

LIBRARIES = ("numpy", "standard library", "sympy")


@pytest.fixture(scope="module")
def real():
    """Docstrings of a few real files."""
    return collect(seed=3, files_per_library=60, libraries=LIBRARIES)


def build(docstrings, **sizes):
    sizes = {"seed": 3, "train_per_label": 12, "test_per_label": 6, **sizes}
    return build_tasks(docstrings, **sizes)


def test_deterministic(real):
    assert collect(seed=3, files_per_library=60, libraries=LIBRARIES) == real
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
            counts = Counter(example.label for example in examples)
            assert set(counts) == set(range(len(task.labels)))
            assert len(set(counts.values())) == 1
    assert Counter(example.label for example in library.train)[0] == 12


def test_labels_are_true(real):
    by_text = {doc.text: doc for doc in real}
    library, kind = build(real)
    for example in library.train:
        assert by_text[example.text].library == library.labels[example.label]
    for example in kind.test:
        assert by_text[example.text].kind == kind.labels[example.label]


def test_the_rarest_label_sets_the_size():
    docstrings = [
        Docstring(f"text number {i} of {kind}", "torch", kind, f"torch/{i}.py")
        for kind in KINDS
        for i in range(4 if kind == "property" else 40)
    ]
    _, kind = build(docstrings, test_per_label=12)
    for examples in (kind.train, kind.test):
        assert set(Counter(example.label for example in examples).values()) <= {1, 2, 3}


def test_one_file_does_not_make_up_a_class():
    docstrings = [
        Docstring(f"text number {i} of {kind}", "torch", kind, "torch/same.py")
        for kind in KINDS
        for i in range(30)
    ]
    _, kind = build(docstrings, train_per_label=30)
    split = kind.train or kind.test
    assert set(Counter(example.label for example in split).values()) == {8}


def test_copies_are_dropped(tmp_path, monkeypatch):
    import shira.cli._demo.tasks as tasks

    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text('"""The same words stand here, twice in all."""\n')
    monkeypatch.setattr(tasks, "library_root", lambda library: tmp_path)
    assert len(collect(seed=0, files_per_library=9, libraries=["x"])) == 1


def test_a_library_that_is_missing_is_left_out():
    assert collect(seed=0, files_per_library=2, libraries=["no_such_library_anywhere"]) == []


def test_the_split_share():
    names = [f"library/{i}.py" for i in range(4000)]
    share = sum(split_of(n, seed=0, test_share=0.25) == "test" for n in names) / len(names)
    assert share == pytest.approx(0.25, abs=0.03)
