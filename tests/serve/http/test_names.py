# SPDX-License-Identifier: Apache-2.0
"""Clients' paths stay below the folder of adapters, whatever they say."""

from __future__ import annotations

import pytest

from shira.errors import AdapterError, ConfigError
from shira.serve.http.names import PathRefusedError, adapter_name, below, folder_of_adapters


@pytest.fixture
def folder(tmp_path):
    """``adapters/`` with a good adapter, links in and out; ``outside/`` beside it."""
    root = tmp_path / "adapters"
    for name in ("adapters/fr", "adapters/deep/de", "outside/x", "adapters-of-others/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter").write_text(name)
    (root / "file.safetensors").write_text("file")
    (root / "link-in").symlink_to(root / "fr")
    (root / "link-out").symlink_to(tmp_path / "outside")
    (root / "link-up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to(tmp_path / "nothing")
    (root / "inner").mkdir()
    (root / "inner" / "adapter").symlink_to(tmp_path / "outside" / "x" / "adapter")
    (root / "shared").mkdir()
    (root / "shared" / "adapter").symlink_to(root / "fr" / "adapter")
    return root


@pytest.mark.parametrize(
    "path",
    ["fr", "deep/de", "fr/../fr", "./fr/", "link-in", "file.safetensors", "shared", "deep"],
)
def test_what_lies_below_is_found(folder, path):
    found = below(folder, path)
    assert folder.resolve() in found.parents
    assert found.exists()
    assert found == found.resolve()


def test_absolute_paths_below_are_fine_and_a_linked_folder_too(folder, tmp_path):
    assert below(folder, str(folder / "fr")) == folder / "fr"
    (tmp_path / "alias").symlink_to(folder)
    assert below(tmp_path / "alias", "fr") == folder / "fr"


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../outside/x",
        "fr/../../outside/x",
        "deep/../../outside",
        "../adapters-of-others/y",
        "link-out",
        "link-out/x",
        "link-up/outside/x",
        "link-up",
        "dangling",
        "inner",
        "/etc/passwd",
        "/",
        ".",
        "fr/..",
    ],
)
def test_what_leads_elsewhere_is_refused(folder, path):
    with pytest.raises(PathRefusedError):
        below(folder, path)


@pytest.mark.parametrize(
    "path",
    ["", "fr\0", "loop", "a" * 300, "a/" * 3000, "\ud800", "fr\udcff", None, 7, ["fr"], {"a": 1}],
)
def test_what_is_no_path_is_refused(folder, path):
    with pytest.raises(AdapterError, match="path") as refused:
        below(folder, path)
    assert not isinstance(refused.value, PathRefusedError)
    assert len(str(refused.value).encode()) < 1000


def test_a_file_whose_name_is_no_text_is_not_served(folder):
    (folder / "fr\udcff").mkdir()  # what the bytes b"fr\xff" are in Python
    with pytest.raises(AdapterError, match="cannot be followed"):
        below(folder, "fr\udcff")


def test_nothing_is_told_of_what_is_outside(folder, tmp_path):
    """The same words for a path that exists outside and for one that does not."""
    messages = []
    for path in ("../outside/x", "../outside/nothing"):
        with pytest.raises(PathRefusedError) as refused:
            below(folder, path)
        messages.append(str(refused.value).replace(path, "PATH"))
    assert messages[0] == messages[1]
    assert str(tmp_path) not in messages[0]


def test_what_is_not_there_is_said_without_the_folders_place(folder):
    with pytest.raises(FileNotFoundError, match="'es'") as missing:
        below(folder, "es")
    assert str(folder) not in str(missing.value)


@pytest.mark.parametrize("name", ["fr", "a", "French-2.1_b:x", "7", "x" * 128])
def test_names(name):
    assert adapter_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "a b", "a\n", "é", "x" * 129, None, 3, []])
def test_names_that_are_refused(name):
    with pytest.raises(AdapterError, match="name"):
        adapter_name(name)


def test_folder_of_adapters(tmp_path):
    assert folder_of_adapters(None, "V") is None
    assert folder_of_adapters("", "V") is None
    assert folder_of_adapters(str(tmp_path), "V") == tmp_path.resolve()
    with pytest.raises(ConfigError, match="V="):
        folder_of_adapters(str(tmp_path / "no"), "V")
