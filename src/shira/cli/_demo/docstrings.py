# SPDX-License-Identifier: Apache-2.0
"""Real text that is on any machine: the docstrings of installed libraries.

Source files are parsed with :mod:`ast` and never imported, so reading them runs none of their code.
`tasks` makes classification tasks of what this module returns.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("class", "function", "method", "module", "property")
"""What a docstring can document, as `Docstring.kind` names it."""

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
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
)
_PROPERTIES = frozenset({"cached_property", "property"})
_MAX_FILE_BYTES = 300_000


@dataclass(frozen=True)
class Docstring:
    """One docstring: its cleaned text, who wrote it, what it documents, and where it stands."""

    text: str
    library: str
    kind: str
    source: str


def library_root(library: str) -> Path | None:
    """The folder of a library's source files, or None where it is not installed."""
    if library == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    try:
        spec = importlib.util.find_spec(library)  # finds a top-level package without importing it
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def source_files(root: Path, *, seed: int, limit: int) -> list[Path]:
    """At most `limit` Python files under `root`, in an order that `seed` alone decides.

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
    path: Path, *, library: str, source: str, max_words: int = 60, min_words: int = 6
) -> list[Docstring]:
    """The docstrings of one source file, cleaned and cut to `max_words` words.

    A file that cannot be parsed has none. Docstrings of fewer than `min_words` words say too little
    to be told apart and are left out.
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
        for kind, raw in _documented(tree)
        if len((text := clean(raw, max_words=max_words)).split()) >= min_words
    ]


def clean(raw: str, *, max_words: int) -> str:
    r"""`raw` as one line of plain words, without what would name the library.

    Links and interactive examples go (their imports name the library); names of the libraries
    become "library"; what is left is cut to the first `max_words` words.

    >>> clean("Like numpy.sum, see https://numpy.org.\n>>> np.sum(x)", max_words=60)
    'Like library.sum, see'
    """
    text = _NAMES.sub("library", _LINK.sub("", _DOCTEST.sub("", raw)))
    return " ".join(text.split()[:max_words])


def _documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(kind, docstring) of everything documented in a module, in source order."""
    if raw := ast.get_docstring(tree):
        yield "module", raw
    yield from _documented_inside(tree, in_class=False)


def _documented_inside(node: ast.AST, *, in_class: bool) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if raw := ast.get_docstring(child):
                yield _kind(child, in_class=in_class), raw
            yield from _documented_inside(child, in_class=isinstance(child, ast.ClassDef))
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _documented_inside(child, in_class=in_class)


def _kind(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, *, in_class: bool) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if not in_class:
        return "function"
    names = {getattr(d, "id", None) or getattr(d, "attr", "") for d in node.decorator_list}
    return "property" if names & _PROPERTIES else "method"
