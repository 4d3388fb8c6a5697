# SPDX-License-Identifier: Apache-2.0
"""Real text that is on any machine: the docstrings of installed libraries.

Source files are parsed with :mod:`ast` and never imported, so reading them runs none of their code.
Everything depends on the seed and the installed files alone.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shira.cli.progress import track

KINDS = ("class", "function", "method", "module", "property")  # that a docstring can document

STANDARD_LIBRARY = "standard library"
LIBRARIES = (  # installed wherever this package is, all with enough documented code
    STANDARD_LIBRARY,
    *("huggingface_hub", "networkx", "numpy", "sympy", "torch", "transformers"),
)

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
_MIN_WORDS = 6  # of a docstring; fewer say too little to be told apart
_MAX_LINES = 12  # of a function that is short

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One docstring: its cleaned text, who wrote it, and what it documents."""

    text: str
    library: str
    kind: str
    source: str
    name: str = ""
    summary: str = ""  # the first paragraph as it stands
    code: str = ""  # of a short function, without the docstring


def library_root(library: str) -> Path | None:
    """Return the folder of a library's source files, or None where it is not installed."""
    if library == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library)  # finds a top-level package without importing it
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def source_files(root: Path, *, seed: int, limit: int) -> list[Path]:
    """Return at most `limit` Python files under `root`, not of tests, in an order of the seed."""
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
    """Return the docstrings of one source file, cleaned; one that cannot be parsed has none."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        return []
    source_code = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source_code)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = source_code.decode(errors="replace").split("\n")
    found = []
    for kind, node in [("module", tree), *_documented(tree)]:
        raw = ast.get_docstring(node) or ""
        text = clean(raw, max_words=max_words)
        if len(text.split()) >= _MIN_WORDS:
            summary = " ".join(raw.split("\n\n")[0].split())
            name = getattr(node, "name", path.stem)
            found.append(Docstring(text, library, kind, source, name, summary, _code(node, lines)))
    return found


def _code(node: Documented, lines: list[str]) -> str:
    if not isinstance(node, ast.FunctionDef) or not node.end_lineno:
        return ""
    body = lines[node.body[0].end_lineno : node.end_lineno]
    code = lines[node.lineno - 1 : node.body[0].lineno - 1] + body
    return textwrap.dedent("\n".join(code)) if body and len(code) <= _MAX_LINES else ""


def clean(raw: str, *, max_words: int) -> str:
    r"""Return the first words of `raw` on one line, without what would name the library.

    >>> clean("Like numpy.sum, see https://numpy.org.\n>>> np.sum(x)", max_words=60)
    'Like library.sum, see'
    """
    text = _NAMES.sub("library", _LINK.sub("", _DOCTEST.sub("", raw)))
    return " ".join(text.split()[:max_words])


def _documented(tree: ast.AST, function: str = "function") -> Iterator[tuple[str, Documented]]:
    """Return (kind, node) of everything that can be documented inside a node, in source order."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ClassDef):
            yield "class", child
            yield from _documented(child, "method")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = {getattr(d, "id", None) or getattr(d, "attr", "") for d in child.decorator_list}
            is_property = function == "method" and names & _PROPERTIES
            yield "property" if is_property else function, child
            yield from _documented(child)
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _documented(child, function)


def collect(
    *, seed: int, files_per_library: int, libraries: Sequence[str] = LIBRARIES
) -> list[Docstring]:
    """Return every distinct docstring of `files_per_library` source files of each library there is.

    Of those that begin with the same plain words the first is taken (libraries copy their own).
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
