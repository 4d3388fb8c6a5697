# SPDX-License-Identifier: Apache-2.0
"""No command writes over what it reads, whatever leads there, nor in the place of a pipe."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shira import Adapter, SparseDelta, Support, chain
from shira.convert import merge

COMMANDS = {
    "report": ("report", "A", "--output", "OUT"),
    "report beside": ("report", "B", "A", "--output", "OUT"),
    "inspect": ("inspect", "A", "--plot", "OUT"),
    "overlap": ("overlap", "A", "B", "--plot", "OUT"),
    "fuse": ("fuse", "A", "B=0.5", "--output", "OUT", "--overwrite"),
    "fuse, weighted": ("fuse", "A=0.5", "B", "--output", "OUT", "--overwrite"),
    "convert": ("convert", "A", "--output", "OUT", "--overwrite"),
    "convert to peft": ("convert", "A", "--format", "peft", "--output", "OUT", "--overwrite"),
    "merge": ("merge", "A", "--base", "BASE", "--output", "OUT", "--overwrite"),
    "merge, undo": (
        *("merge", "A", "--base", "BASE", "--output", "merged", "--undo", "OUT", "--overwrite"),
    ),
}
ON_BASE = {
    "convert": ("convert", "A", "--base", "BASE", "--output", "OUT", "--overwrite"),
    "extract": ("extract", "BASE", "TUNED", "--output", "OUT", "--overwrite"),
    "extract, the other": ("extract", "TUNED", "BASE", "--output", "OUT", "--overwrite"),
    "fuse": ("fuse", "A", "B", "--base", "BASE", "--output", "OUT", "--overwrite"),
    "merge": COMMANDS["merge"],
    "merge, undo": COMMANDS["merge, undo"],
    "diff": ("diff", "BASE", "TUNED", "--output", "OUT", "--overwrite"),
    "diff, the other": ("diff", "TUNED", "BASE", "--output", "OUT", "--overwrite"),
    "apply": ("apply", "BASE", "step", "--output", "OUT", "--overwrite"),
    "unmerge": ("unmerge", "BASE", "--undo", "UNDO", "--output", "OUT", "--overwrite"),
    "inspect": ("inspect", "A", "--base", "BASE", "--plot", "OUT"),
    "report": ("report", "A", "--base", "BASE", "--output", "OUT"),
    "train": (
        *("train", "--task", "causal-lm", "--train-file", "data.csv", "--model", "BASE"),
        *("--output", "OUT", "--overwrite"),
    ),
    "serve": ("serve", "model", "--adapters", "BASE", "--journal", "OUT"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two adapters (one in each format), a base, a merged one and its undo file."""
    monkeypatch.chdir(tmp_path)
    weight = torch.randn(8, 8)
    Path("base").mkdir()
    save_file({"a.weight": weight}, "base/model.safetensors")
    delta = SparseDelta(Support((8, 8), torch.arange(9)), torch.randn(9))
    Adapter({"a.weight": delta}).save("a", format="peft")
    Adapter({"a.weight": delta}).save("b.safetensors")
    Path("a/metrics.json").write_text("{}")
    merge("a", "base", "merged", undo="undo")
    chain.diff("base", "merged", "step")
    Path("data.csv").write_text("text\nhello\n")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def refused(shira, place, words, **named):
    before = content(place)
    line = []
    for word in map(str, words):
        name, sign, weight = word.partition("=")
        line.append(f"{named.get(name, name)}{sign}{weight}")
    answer = shira(*line)
    assert answer.status == 2, line
    assert answer.err.startswith("error: "), line
    assert len(answer.err.splitlines()) == 1
    assert content(place) == before, line
    return answer.err


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_an_output_that_is_an_adapter_that_is_read(shira, place, words):
    named = {"B": "b.safetensors", "BASE": "base"}
    Path("link").symlink_to("a")
    Path("file").symlink_to("a/adapter_model.safetensors")
    os.link("a/adapter_config.json", "hard")
    for out in (
        *("a", "./a", "a/../a", place / "a", "link", "file", "hard"),
        *("a/adapter_model.safetensors", "link/adapter_config.json"),
    ):
        error = refused(shira, place, words, A="a", OUT=out, **named)
        assert "read here" in error
    weights = "a/adapter_model.safetensors"
    refused(shira, place, words, A=weights, OUT="a/adapter_config.json", **named)
    one = {"A": "b.safetensors", "B": "a", "BASE": "base"}
    os.link("b.safetensors", "hard2")
    for out in ("b.safetensors", "a/../b.safetensors", "hard2"):
        refused(shira, place, words, OUT=out, **one)


@pytest.mark.parametrize("words", ON_BASE.values(), ids=ON_BASE)
def test_an_output_within_a_checkpoint(shira, place, words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    named = {"A": "a", "B": "b.safetensors", "TUNED": "merged", "UNDO": "undo"}
    base = "merged" if words[0] == "unmerge" else "base"
    named["TUNED"] = "base" if base == "merged" else "merged"
    Path("link").symlink_to(base)
    for out in (
        base,
        f"{base}/model.safetensors",
        f"{base}/new",
        "link",
        "link/new",
        f"{base}/x/y",
    ):
        refused(shira, place, words, BASE=base, OUT=out, **named)


def test_outputs_that_are_other_inputs_or_outputs(shira, place):
    merged = ("merge", "a", "--base", "base", "--output")
    assert "overlap" in refused(shira, place, (*merged, "x", "--undo", "x"))
    assert "overlap" in refused(shira, place, (*merged, "x", "--undo", "x/undo"))
    Path("merged/adapter").mkdir()
    Adapter.load("a").save("merged/adapter/a.safetensors")
    line = ("merge", "merged/adapter", "--base", "base", "--output", "merged", "--overwrite")
    assert "holds merged/adapter" in refused(shira, place, line)
    back = ("unmerge", "merged", "--undo", "undo", "--overwrite", "--output")
    assert "is read here" in refused(shira, place, (*back, "undo"))
    assert "metrics.json" in refused(shira, place, ("report", "a", "-o", "a/metrics.json"))
    Path("job").mkdir()
    Path("data.csv").rename("job/metrics.json")
    train = ("train", "--task", "causal-lm", "--model", "base", "--output", "job")
    error = refused(shira, place, (*train, "--train-file", "job/metrics.json"))
    assert "job/metrics.json: is read here" in error


def test_new_files_and_pictures_within_an_adapter_are_fine(shira, place):
    for _ in range(2):
        assert shira("report", "a", "-o", "a/report.html").status == 0
        assert shira("inspect", "a", "--plot", "a/plot.png").status == 0
    assert shira("convert", "a", "-o", "a/small.safetensors").status == 0
    assert Adapter.load("a/small.safetensors") == Adapter.load("a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("words", [*COMMANDS.values(), ON_BASE["extract"], ON_BASE["unmerge"]])
def test_a_pipe_stays_a_pipe(shira, place, words):
    os.mkfifo("pipe")
    named = {"A": "a", "B": "b.safetensors", "BASE": "base", "TUNED": "merged", "UNDO": "undo"}
    assert "a pipe, a device or a socket" in refused(shira, place, words, OUT="pipe", **named)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("format", ["compact", "peft"])
def test_an_adapter_does_not_replace_a_pipe(place, format):
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=r"pipe"):
        Adapter.load("a").save("pipe", format=format)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    Path("taken").mkdir()
    os.mkfifo("taken/adapter_config.json")
    with pytest.raises(ValueError, match=r"a pipe, a device or a socket"):
        Adapter.load("a").save("taken", format="peft")
    assert os.listdir("taken") == ["adapter_config.json"]


def test_a_folder_for_a_file_and_a_file_for_a_folder(shira, place):
    Path("folder").mkdir()
    for words in (
        ("report", "a", "-o", "folder"),
        ("inspect", "a", "--plot", "folder"),
        ("overlap", "a", "b.safetensors", "--plot", "folder"),
        ("merge", "a", "--base", "base", "-o", "x", "--undo", "folder"),
        ("merge", "a", "--base", "base", "-o", "data.csv", "--overwrite"),
        ("convert", "a", "--format", "peft", "-o", "data.csv", "--overwrite"),
        ("convert", "a", "--format", "patch", "--base", "base", "-o", "folder", "--overwrite"),
        ("demo", "--quick", "--output", "data.csv"),
        ("demo", "--quick", "--output", "base"),
        (
            *("train", "--task", "causal-lm", "--model", "base", "--train-file", "data.csv"),
            *("--output", "undo"),
        ),
    ):
        refused(shira, place, words)
