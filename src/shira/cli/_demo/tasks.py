# SPDX-License-Identifier: Apache-2.0
"""Two text classification tasks made of docstrings, balanced and split by source file.

One task asks which library wrote a docstring, the other what kind of thing it documents. All
docstrings of a source file fall on one side of the split, and a text occurs once, so that nothing
of the test set was seen in training. Everything depends on the seed and the installed files alone.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shira.cli._demo.docstrings import (
    KINDS,
    LIBRARIES,
    Docstring,
    library_root,
    read_docstrings,
    source_files,
)

_MAX_A_FILE = 8  # of one label, so that no single file makes up a class
_PLAIN_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Example:
    """A text, the index of its label in `Task.labels`, and the source file it stands in."""

    text: str
    label: int
    source: str


@dataclass(frozen=True)
class Task:
    """A classification task; `train` and `test` hold equally many examples of each label."""

    name: str
    question: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def collect(
    *,
    seed: int,
    files_per_library: int,
    libraries: Sequence[str] = LIBRARIES,
    track: Callable[[Sequence[tuple[str, Path]]], Iterable[tuple[str, Path]]] = iter,
) -> list[Docstring]:
    """Every distinct docstring of `files_per_library` source files of each library.

    Args:
        seed: decides which files are read where a library has more than enough.
        files_per_library: how many files of each library are read.
        libraries: which libraries; one that is not installed is left out.
        track: wraps the list of files, to show progress.
    """
    todo = [
        (library, path)
        for library in libraries
        if (root := library_root(library)) is not None
        for path in source_files(root, seed=seed, limit=files_per_library)
    ]
    roots = {library: library_root(library) for library in libraries}
    found = []
    for library, path in track(todo):
        root = roots[library]
        source = f"{library}/{path.relative_to(root).as_posix()}" if root else path.name
        found += read_docstrings(path, library=library, source=source)
    return list(_distinct(found))


def split_of(source: str, *, seed: int, test_share: float) -> str:
    """`"train"` or `"test"`, for a whole source file, from its name and the seed alone."""
    return "test" if random.Random(f"{seed} split {source}").random() < test_share else "train"


def build_tasks(
    docstrings: Sequence[Docstring],
    *,
    seed: int,
    train_per_label: int,
    test_per_label: int,
) -> list[Task]:
    """The tasks `library` and `kind`, each balanced over its labels.

    The test share of the source files is what the two sizes ask for. Where a label has too few
    docstrings, every label of that task gets as many as the rarest one has.
    """
    share = test_per_label / (train_per_label + test_per_label)
    sides: dict[str, list[Docstring]] = {"train": [], "test": []}
    for doc in docstrings:
        sides[split_of(doc.source, seed=seed, test_share=share)].append(doc)
    present = {doc.library for doc in docstrings}
    labels = {
        "library": tuple(name for name in LIBRARIES if name in present),
        "kind": KINDS,
    }
    questions = {
        "library": "Which library wrote this docstring?",
        "kind": "What kind of thing does this docstring document?",
    }
    return [
        Task(
            name=name,
            question=questions[name],
            labels=labels[name],
            train=_balanced(sides["train"], name, labels[name], train_per_label, seed),
            test=_balanced(sides["test"], name, labels[name], test_per_label, seed),
        )
        for name in ("library", "kind")
    ]


def _balanced(
    docstrings: Sequence[Docstring], field: str, labels: tuple[str, ...], size: int, seed: int
) -> tuple[Example, ...]:
    """`size` examples of each label (fewer for all where one label has fewer), shuffled.

    Within a label the value of the other field is spread as evenly as there is text, so that one
    task cannot be answered through the other.
    """
    other = "kind" if field == "library" else "library"
    drawn: dict[str, list[Docstring]] = {}
    for label in labels:
        rng = random.Random(f"{seed} {field} {label}")
        groups: dict[str, list[Docstring]] = defaultdict(list)
        taken: dict[str, int] = defaultdict(int)
        candidates = [doc for doc in docstrings if getattr(doc, field) == label]
        rng.shuffle(candidates)
        for doc in candidates:
            if taken[doc.source] < _MAX_A_FILE:
                taken[doc.source] += 1
                groups[getattr(doc, other)].append(doc)
        drawn[label] = list(_round_robin([groups[key] for key in sorted(groups)]))[:size]
    fewest = min(len(docs) for docs in drawn.values())
    examples = [
        Example(doc.text, labels.index(label), doc.source)
        for label, docs in drawn.items()
        for doc in docs[:fewest]
    ]
    random.Random(f"{seed} {field} order").shuffle(examples)
    return tuple(examples)


def _round_robin(groups: Sequence[Sequence[Docstring]]) -> Iterator[Docstring]:
    for turn in range(max(map(len, groups), default=0)):
        for group in groups:
            if turn < len(group):
                yield group[turn]


def _distinct(docstrings: Iterable[Docstring]) -> Iterator[Docstring]:
    """Docstrings whose first plain words were not seen before (libraries copy their own)."""
    seen: set[tuple[str, ...]] = set()
    for doc in docstrings:
        key = tuple(_PLAIN_WORD.findall(doc.text.lower()))[:16]
        if key not in seen:
            seen.add(key)
            yield doc
