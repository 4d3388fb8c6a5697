# SPDX-License-Identifier: Apache-2.0
"""Two text classification tasks of real text that is on any machine: docstrings of libraries.

One task asks which library wrote a docstring, the other what kind of thing it documents. All
docstrings of a source file fall on one side of the split, and a text occurs once, so that nothing
of the test set was seen in training. Everything depends on the seed and the installed files alone;
those are parsed with :mod:`ast` and never imported, so reading them runs none of their code.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import random
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shira.cli.progress import track

KINDS = ("class", "function", "method", "module", "property")
"""Things that a docstring can document, as `Docstring.kind` names them."""

STANDARD_LIBRARY = "standard library"
LIBRARIES = (
    STANDARD_LIBRARY,
    "huggingface_hub",
    "networkx",
    "numpy",
    "sympy",
    "torch",
    "transformers",
)
"""Libraries that are installed wherever this package is, all with enough documented code."""

# Words that would give the library away by name; each is replaced by the word "library".
_NAMES = re.compile(
    r"\b(?:c?python|hugging ?face(?:_hub)?|hugging face|hf|networkx|nx|numpy|np|ndarray|sympy|"
    r"(?:py)?torch|transformers?)\b",
    re.IGNORECASE,
)
_LINK = re.compile(r"https?://\S+")
_DOCTEST = re.compile(r"^\s*(?:>>>|\.\.\. ).*$", re.MULTILINE)
_PLAIN_WORD = re.compile(r"[a-z]+")
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
)
_PROPERTIES = frozenset({"cached_property", "property"})
_MAX_FILE_BYTES = 300_000
_MAX_A_FILE = 8  # of one label, so that no single file makes up a class
_MIN_WORDS = 6  # of a docstring; fewer say too little to be told apart


@dataclass(frozen=True)
class Docstring:
    """One docstring: its cleaned text, who wrote it, what it documents, and where it stands."""

    text: str
    library: str
    kind: str
    source: str


@dataclass(frozen=True)
class Task:
    """A classification task, named as the field of `Docstring` that it asks for.

    `train` and `test` hold equally many docstrings of each label.
    """

    name: str
    question: str
    labels: tuple[str, ...]
    train: tuple[Docstring, ...]
    test: tuple[Docstring, ...]

    def answer(self, doc: Docstring) -> int:
        """Return the index of a docstring's label in `labels`."""
        return self.labels.index(getattr(doc, self.name))


def library_root(library: str) -> Path | None:
    """Return the folder of a library's source files, or None where it is not installed."""
    if library == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library)  # finds a top-level package without importing it
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def source_files(root: Path, *, seed: int, limit: int) -> list[Path]:
    """Return at most `limit` Python files under `root`, in an order that `seed` alone decides.

    Test folders and other people's packages inside `root` are left out.
    """
    found = sorted(
        path
        for path in root.rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    )
    random.Random(f"{seed} files").shuffle(found)
    return found[:limit]


def read_docstrings(
    path: Path, *, library: str, source: str, max_words: int = 60
) -> list[Docstring]:
    """Return the docstrings of one source file, cleaned and cut to `max_words` words.

    A file that cannot be parsed has none.
    """
    if path.stat().st_size > _MAX_FILE_BYTES:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [
        Docstring(text, library, kind, source)
        for kind, raw in [("module", ast.get_docstring(tree) or ""), *_documented(tree)]
        if len((text := clean(raw, max_words=max_words)).split()) >= _MIN_WORDS
    ]


def clean(raw: str, *, max_words: int) -> str:
    r"""Return `raw` as one line of plain words, without what would name the library.

    Links and interactive examples go (their imports name the library); names of the libraries
    become "library"; what is left is cut to the first `max_words` words.

    >>> clean("Like numpy.sum, see https://numpy.org.\n>>> np.sum(x)", max_words=60)
    'Like library.sum, see'
    """
    text = _NAMES.sub("library", _LINK.sub("", _DOCTEST.sub("", raw)))
    return " ".join(text.split()[:max_words])


def _documented(node: ast.AST, *, in_class: bool = False) -> Iterator[tuple[str, str]]:
    """Return (kind, docstring) of everything documented inside a node, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if raw := ast.get_docstring(child):
                yield _kind(child, in_class=in_class), raw
            yield from _documented(child, in_class=isinstance(child, ast.ClassDef))
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _documented(child, in_class=in_class)


def _kind(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, *, in_class: bool) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if not in_class:
        return "function"
    names = {getattr(d, "id", None) or getattr(d, "attr", "") for d in node.decorator_list}
    return "property" if names & _PROPERTIES else "method"


def collect(
    *, seed: int, files_per_library: int, libraries: Sequence[str] = LIBRARIES
) -> list[Docstring]:
    """Return every distinct docstring of `files_per_library` source files of each library.

    The seed decides which files; a library that is not installed is left out. Of docstrings that
    begin with the same plain words the first is taken (libraries copy their own).
    """
    todo = [
        (library, root, path)
        for library in libraries
        if (root := library_root(library)) is not None
        for path in source_files(root, seed=seed, limit=files_per_library)
    ]
    found: dict[tuple[str, ...], Docstring] = {}
    for library, root, path in track(todo, "reading docstrings"):
        source = f"{library}/{path.relative_to(root).as_posix()}"
        for doc in read_docstrings(path, library=library, source=source):
            found.setdefault(tuple(_PLAIN_WORD.findall(doc.text.lower()))[:16], doc)
    return list(found.values())


def split_of(source: str, *, seed: int, test_share: float) -> str:
    """Return ``"train"`` or ``"test"`` for a source file, from its name and the seed alone."""
    return "test" if random.Random(f"{seed} split {source}").random() < test_share else "train"


def build_tasks(
    docstrings: Sequence[Docstring], *, seed: int, train_per_label: int, test_per_label: int
) -> list[Task]:
    """Return the tasks `library` and `kind`, each balanced over its labels.

    The test share of the source files is what the two sizes ask for. Where a label has too few
    docstrings, every label of that task gets as many as the rarest one has.
    """
    share = test_per_label / (train_per_label + test_per_label)
    sides: dict[str, list[Docstring]] = {"train": [], "test": []}
    for doc in docstrings:
        sides[split_of(doc.source, seed=seed, test_share=share)].append(doc)
    present = {doc.library for doc in docstrings}
    libraries = tuple(name for name in LIBRARIES if name in present)
    return [
        Task(
            name=name,
            question=question,
            labels=labels,
            train=_balanced(sides["train"], name, labels, train_per_label, seed),
            test=_balanced(sides["test"], name, labels, test_per_label, seed),
        )
        for name, question, labels in (
            ("library", "Which library wrote this docstring?", libraries),
            ("kind", "What kind of thing does this docstring document?", KINDS),
        )
    ]


def _balanced(
    docstrings: Sequence[Docstring], field: str, labels: tuple[str, ...], size: int, seed: int
) -> tuple[Docstring, ...]:
    """Return `size` of each label (fewer for all where one label has fewer), shuffled.

    Within a label the value of the other field is spread as evenly as there is text, so that one
    task cannot be answered through the other.
    """
    other = "kind" if field == "library" else "library"
    drawn: list[list[Docstring]] = []
    for label in labels:
        groups: dict[str, list[Docstring]] = defaultdict(list)
        taken: dict[str, int] = defaultdict(int)
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
    return tuple(chosen)
