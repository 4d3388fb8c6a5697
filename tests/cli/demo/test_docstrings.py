# SPDX-License-Identifier: Apache-2.0
"""Docstrings out of source files, decided by the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest

from shira.cli.demo.docstrings import (
    KINDS,
    LIBRARIES,
    clean,
    collect,
    library_root,
    read_docstrings,
    source_files,
    split_of,
)

SOME = ("numpy", "standard library", "sympy")

SOURCE = '''
"""This module says in enough words what it is for."""
raise RuntimeError("source files are parsed, never run")

def outside():
    """A function that stands in the module, with enough words."""
    def within():
        """A function that stands in a function, with enough words."""

class Thing:
    """A class whose documentation has just about enough words."""
    def method(self):
        """A method that does something described in enough words."""
    @property
    def size(self):
        """How large the thing is, in a good number of words."""
    @functools.cached_property
    def costly(self):
        """How large it is after work, in a good number of words."""
    async def later(self):
        """A method that waits for something, in a number of words."""
    class Inner:
        """A class inside of a class, documented in enough words."""
    def short(self):
        """Too short."""

if True:
    def guarded():
        """A function behind a condition, described in enough words."""
'''


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "thing.py"
    path.write_text(SOURCE)
    return path


def test_kinds(source):
    found = read_docstrings(source, library="numpy", source="numpy/thing.py")
    assert Counter(doc.kind for doc in found) == {
        "module": 1,
        "function": 3,
        "class": 2,
        "method": 2,
        "property": 2,
    }
    assert {doc.kind for doc in found} == set(KINDS)
    assert {(doc.library, doc.source) for doc in found} == {("numpy", "numpy/thing.py")}
    assert not any("short" in doc.text for doc in found)


def test_code_of_short_functions(tmp_path):
    path = tmp_path / "thing.py"
    path.write_text(
        'class Shape:\n    def size(self, unit):\n        """How large it is in all, '
        'in some unit.\n\n        And more.\n        """\n        # scaled\n        return 1\n'
    )
    (doc,) = read_docstrings(path, library="x", source="x")
    assert doc.summary == "How large it is in all, in some unit."
    assert (doc.name, doc.kind) == ("size", "method")
    assert doc.code == "def size(self, unit):\n    # scaled\n    return 1"


def test_texts_are_cut(source):
    found = read_docstrings(source, library="x", source="x", max_words=7)
    assert {len(doc.text.split()) for doc in found} == {7}


@pytest.mark.parametrize("content", [b"def f(:", b"\xff\xfe\x00broken", b"x = '\\0'\0"])
def test_a_file_that_is_no_python_has_no_docstrings(tmp_path, content):
    path = tmp_path / "broken.py"
    path.write_bytes(content)
    assert read_docstrings(path, library="x", source="x") == []


def test_clean_takes_out_what_names_the_library():
    raw = """Like numpy.sum of an ndarray in PyTorch's torch.Tensor.

    See https://pytorch.org/docs for Hugging Face transformers.
    >>> import numpy as np
    >>> np.sum(x)
    ... 3
    Returns a networkx graph (nx) or a SymPy expression.
    """
    text = clean(raw, max_words=60).lower()
    for name in ("numpy", "np", "ndarray", "torch", "transformers", "hugging", "nx", "sympy"):
        assert name not in text
    assert ">>>" not in text
    assert text.startswith("like library.sum of an library in library's library.tensor. see for")


def test_clean_keeps_words_that_only_contain_a_name():
    assert clean("torchlight and input", max_words=9) == "torchlight and input"


def test_every_library_is_found_without_importing_it():
    for library in LIBRARIES:
        root = library_root(library)
        assert root is not None, library
        assert root.is_dir(), library
    assert library_root("no_such_library_anywhere") is None


def test_source_files_depend_on_the_seed_alone_and_leave_tests_out(tmp_path):
    for name in ("a", "b", "c", "tests/d", "site-packages/e", "sub/f"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = source_files(tmp_path, seed=1, limit=10)
    assert {path.name for path in found} == {"a.py", "b.py", "c.py", "f.py"}
    assert source_files(tmp_path, seed=1, limit=10) == found
    assert source_files(tmp_path, seed=1, limit=2) == found[:2]
    assert any(source_files(tmp_path, seed=seed, limit=10) != found for seed in range(2, 9))


@pytest.fixture(scope="module")
def real():
    """Docstrings of a few real files."""
    return collect(seed=3, files_per_library=60, libraries=SOME)


def test_deterministic(real):
    assert collect(seed=3, files_per_library=60, libraries=SOME) == real


def test_copies_are_dropped(tmp_path, monkeypatch):
    import shira.cli.demo.docstrings as docstrings

    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text('"""The same words stand here, twice in all."""\n')
    monkeypatch.setattr(docstrings, "library_root", lambda library: tmp_path)
    assert len(collect(seed=0, files_per_library=9, libraries=["x"])) == 1


def test_a_library_that_is_missing_is_left_out():
    assert collect(seed=0, files_per_library=2, libraries=["no_such_library_anywhere"]) == []


def test_the_split_share():
    names = [f"library/{i}.py" for i in range(4000)]
    share = sum(split_of(n, seed=0, test_share=0.25) == "test" for n in names) / len(names)
    assert share == pytest.approx(0.25, abs=0.03)
