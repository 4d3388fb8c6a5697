# SPDX-License-Identifier: Apache-2.0
"""A link of two checkpoints: applied to the first it makes the files of the second."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import chain
from shira.chain import coding, files, link
from shira.errors import ConfigError
from tests.chain import reference
from tests.chain.checkpoints import (
    DTYPES,
    changed,
    contents,
    file_of,
    random_tensor,
    write,
)

SHAPES = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(lambda s: [*s, 2])


@st.composite
def two_checkpoints(draw):
    """Tensors of the old and the new one: changed, added, gone, renamed, reshaped, retyped."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    old, new = {}, {}
    for number in range(draw(st.integers(1, 6))):
        name, dtype, shape = f"t{number}", draw(st.sampled_from(DTYPES)), draw(SHAPES)
        tensor = random_tensor(rng, dtype, shape)
        fate = draw(st.sampled_from(["same", "changed", "new", "gone", "renamed", "other", "flat"]))
        if fate != "new":
            old[name] = tensor
        if fate == "changed":
            tensor = changed(rng, tensor, draw(st.sampled_from([0.01, 0.3, 1])))
        if fate == "other":
            tensor = random_tensor(rng, draw(st.sampled_from(DTYPES)), draw(SHAPES))
        if fate == "flat":
            tensor = tensor[0], [int(np.prod(shape))], tensor[2]
        if fate != "gone":
            new[f"u{number}" if fate == "renamed" else name] = tensor
    for tensors in (old, new):  # a checkpoint has a tensor
        tensors["last"] = random_tensor(rng, "F32", [3])
    return old, new


def sharded(tensors, count):
    names = [f"model-{i}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    shards = {name: {} for name in names}
    for number, (key, tensor) in enumerate(tensors.items()):
        shards[names[number % count]][key] = tensor
    return {name: part for name, part in shards.items() if part}


@settings(max_examples=60, deadline=None)
@given(two_checkpoints(), st.integers(1, 3), st.integers(1, 3))
def test_the_files_of_the_new_one_come_back(tensors, old_shards, new_shards):
    with tempfile.TemporaryDirectory() as place:
        old, new = (
            write(Path(place, name), sharded(part, count), **{"notes.txt": name})
            for name, part, count in zip(
                ("old", "new"), tensors, (old_shards, new_shards), strict=True
            )
        )
        link = Path(place, "link")
        chain.diff(old, new, link)
        chain.apply(old, link, Path(place, "made"))
        assert contents(Path(place, "made")) == contents(new)
        by_hand = reference.applied(
            link.read_bytes(), {k: raw for k, (_, _, raw) in tensors[0].items()}
        )
        assert by_hand.items() <= contents(new).items()
        assert chain.verify(link, new).applied == int(tensors[0] != tensors[1])
        assert chain.verify(link, old).applied == 0


def test_pieces_are_small_and_many(tmp_path, monkeypatch):
    for module in (coding, files, chain.applying, chain.link):
        monkeypatch.setattr(module, "PIECE", 64)
    monkeypatch.setattr(reference, "PIECE", 64)
    rng = np.random.default_rng(0)
    old = {f"t{i}": random_tensor(rng, "F32", [i * 7, 5]) for i in range(8)}
    new = {key: changed(rng, tensor, 0.05) for key, tensor in old.items()}
    write(tmp_path / "old", {"model.safetensors": old}, **{"notes.md": "a" * 100})
    write(tmp_path / "new", {"model.safetensors": new}, **{"notes.md": "b" * 321})
    chain.diff(tmp_path / "old", tmp_path / "new", tmp_path / "link")
    chain.apply(tmp_path / "old", tmp_path / "link", tmp_path / "made")
    assert contents(tmp_path / "made") == contents(tmp_path / "new")
    by_hand = reference.applied((tmp_path / "link").read_bytes(), {k: t[2] for k, t in old.items()})
    assert by_hand["model.safetensors"] == (tmp_path / "new/model.safetensors").read_bytes()


def test_the_report(tmp_path):
    rng = np.random.default_rng(0)
    old = {name: random_tensor(rng, "F32", [4, 4]) for name in "abcd"}
    new = {"a": old["a"], "b": changed(rng, old["b"], 0.5), "c2": old["c"], "e": old["a"]}
    write(tmp_path / "old", {"model.safetensors": old}, **{"a.txt": "1", "b.txt": "2", "c.txt": ""})
    others = {"a.txt": "1", "b.txt": "3", "d/e.txt": "4", "optimizer.pt": "x", "model.gguf": ""}
    write(tmp_path / "new", {"model.safetensors": new}, **others)
    told = chain.diff(tmp_path / "old", tmp_path / "new", tmp_path / "link")
    assert [(t.name, t.old) for t in told.tensors] == [("b", "b"), ("c2", "c"), ("e", None)]
    assert set(told.gone) == {"c", "d"}
    assert set(told.carried) == {"b.txt", "d/e.txt"}
    assert set(told.left_out) == {"optimizer.pt", "model.gguf"}
    assert told.numel == 64
    assert told.size == (tmp_path / "link").stat().st_size
    chain.apply(tmp_path / "old", tmp_path / "link", tmp_path / "made")
    left = {
        name: raw for name, raw in contents(tmp_path / "new").items() if name not in told.left_out
    }
    assert contents(tmp_path / "made") == left


def test_single_files(tmp_path):
    rng = np.random.default_rng(0)
    old = {"w": random_tensor(rng, "F16", [8, 8])}
    new = {"w": changed(rng, old["w"], 0.1)}
    (tmp_path / "old.safetensors").write_bytes(file_of(old))
    (tmp_path / "new.safetensors").write_bytes(file_of(new, {"format": "pt", "step": "1"}))
    chain.diff(tmp_path / "old.safetensors", tmp_path / "new.safetensors", tmp_path / "link")
    told = chain.apply(
        tmp_path / "old.safetensors", tmp_path / "link", tmp_path / "out.safetensors"
    )
    assert told.files == ("out.safetensors",)
    same = (tmp_path / "new.safetensors").read_bytes()
    assert (tmp_path / "out.safetensors").read_bytes() == same
    assert told.size == len(same)
    chain.apply(tmp_path / "old.safetensors", tmp_path / "link", in_place=True)
    assert (tmp_path / "old.safetensors").read_bytes() == same


def test_an_output_does_not_take_the_place_of_something(tmp_path):
    rng = np.random.default_rng(0)
    old = write(tmp_path / "old", {"model.safetensors": {"w": random_tensor(rng, "F16", [2])}})
    link = tmp_path / "link"
    link.write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        chain.diff(old, old, link)
    assert link.read_text() == "precious"
    with pytest.raises(ConfigError, match="lies in the checkpoint"):
        chain.diff(old, old, old / "link")
    chain.diff(old, old, link, overwrite=True)
    assert chain.verify(link, old).applied == 0


@pytest.mark.parametrize("name", ["a\\b.txt", os.fsdecode(b"\xff.txt")])
@pytest.mark.parametrize("odd", ["old", "new"])  # as a file that comes, and as one that goes
def test_a_name_that_no_link_can_have_is_refused(tmp_path, name, odd):
    rng = np.random.default_rng(0)
    tensors = {"model.safetensors": {"w": random_tensor(rng, "F16", [2])}}
    paths = [write(tmp_path / folder, tensors) for folder in ("old", "new")]
    try:
        (tmp_path / odd / name).touch()
    except OSError:
        pytest.skip("a file system whose names are UTF-8")
    with pytest.raises(ConfigError, match=rf"{odd}: .* is no file inside a folder"):
        chain.diff(*paths, tmp_path / "link")
    assert not (tmp_path / "link").exists()


def test_a_header_that_deflates_to_almost_nothing_comes_back(tmp_path, monkeypatch):
    tensors = {"w": random_tensor(np.random.default_rng(0), "F16", [2])}
    (tmp_path / "old").write_bytes(file_of(tensors))
    (tmp_path / "new").write_bytes(file_of(tensors, {"log": "loss 0.1\n" * 10**6}))
    chain.diff(tmp_path / "old", tmp_path / "new", tmp_path / "link")
    chain.apply(tmp_path / "old", tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "new").read_bytes()
    monkeypatch.setattr(link, "HEADER_LIMIT", 10**7)
    with pytest.raises(ConfigError, match="more than a link can have"):
        chain.diff(tmp_path / "old", tmp_path / "new", tmp_path / "longer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new", "old", "out"]
