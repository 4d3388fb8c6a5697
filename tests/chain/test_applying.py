# SPDX-License-Identifier: Apache-2.0
"""Chains: entered anywhere, applied whole or not at all, on what they stand on and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shira import chain
from shira.chain import applying, files
from shira.checkpoints import opening
from shira.errors import ConfigError, FileFormatError, ShiraError, WrongBaseError
from shira.store import atomic
from tests.chain.checkpoints import bfloat16, chain_of, contents, model, write

LINKS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints 0 to 6 and the links between them; nobody changes them."""
    folder = tmp_path_factory.mktemp("chain")
    paths = chain_of(folder, LINKS)
    links = [folder / f"{n + 1}.link" for n in range(LINKS)]
    for n, link in enumerate(links):
        chain.diff(paths[n], paths[n + 1], link)
    return paths, links


def test_a_chain_is_entered_at_any_link(made, tmp_path):
    paths, links = made
    for at in range(LINKS + 1):
        told = chain.apply(paths[at], links, tmp_path / f"out{at}")
        assert (told.skipped, told.applied) == (at, LINKS - at)
        assert contents(told.output) == contents(paths[LINKS])
        assert chain.verify(links, paths[at]).applied == at
    told = chain.apply(paths[2], links[2:4], tmp_path / "part")
    assert contents(told.output) == contents(paths[4])
    assert told.hash == chain.verify(links[3]).new


def test_many_links_with_few_files_open(made, tmp_path):
    """To and fro, in a process that may have few files open; verified and applied in one pass."""
    paths, links = made
    back = tmp_path / "back.link"
    chain.diff(paths[1], paths[0], back)
    script = """
import resource, sys
from shira import chain
_, old, there, back, out = sys.argv
links = [there, back] * 100 + [there]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
assert chain.verify(links).links == 201
assert chain.apply(old, links, out).applied == 201
"""
    given = [paths[0], links[0], back, tmp_path / "out"]
    subprocess.run([sys.executable, "-c", script, *given], check=True, timeout=60)
    assert contents(tmp_path / "out") == contents(paths[1])


def test_a_link_that_is_replaced_while_it_is_read_is_refused(made, tmp_path, monkeypatch):
    paths, links = made
    monkeypatch.setattr("shira.chain.link.OPEN", 1)
    mine = [Path(shutil.copy(link, tmp_path)) for link in links[:2]]
    with applying.open_chain(mine) as found:
        found[0].check_data()
        found[1].check_data()
        os.replace(shutil.copy(links[0], tmp_path / "new"), mine[0])
        for _ in range(2):
            with pytest.raises(FileFormatError, match=r"1\.link: was replaced or written to"):
                found[0].check_data()
    chain.apply(paths[0], mine, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(paths[2])


def test_one_link_after_the_other_in_place(made, tmp_path):
    paths, links = made
    here = tmp_path / "here"
    shutil.copytree(paths[0], here)
    for n, link in enumerate(links):
        told = chain.apply(here, link, in_place=True)
        assert told.output == here
        assert contents(here) == contents(paths[n + 1])
    assert list(tmp_path.iterdir()) == [here]
    assert chain.apply(here, links, in_place=True).applied == 0
    assert contents(here) == contents(paths[LINKS])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_fifty_times_the_old_or_the_new_one_is_there(made, tmp_path):
    paths, links = made
    here = tmp_path / "here"
    shutil.copytree(paths[0], here)
    old, new = contents(paths[0]), contents(paths[LINKS])
    rng, killed, seen, longest = random.Random(0), 0, [], 0.1
    while killed < 50:
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                chain.apply(here, links, in_place=True)
                os._exit(0)
            os._exit(1)
        started = time.monotonic()
        if killed % 10:  # else it may end, to know how long that takes
            time.sleep(rng.random() * longest)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += 1
        if status == 0:
            longest = time.monotonic() - started
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL
        found = contents(here)
        assert found in (old, new)
        seen.append(found == new)
        if seen[-1]:
            shutil.rmtree(here)
            shutil.copytree(paths[0], here)
    assert not all(seen)
    chain.apply(here, links, in_place=True)
    assert list(tmp_path.iterdir()) == [here]  # what the killed ones left is gone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_before_each_step_of_writing(made, tmp_path):
    paths, links = made
    here = tmp_path / "here"
    shutil.copytree(paths[0], here)
    old, new = contents(paths[0]), contents(paths[LINKS])
    found = []
    for step in range(1, 40):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                _dies_at(step)
                chain.apply(here, links, in_place=True)
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        found.append(contents(here))
        assert found[-1] in (old, new)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if found[-1] == new:
            shutil.rmtree(here)
            shutil.copytree(paths[0], here)
    assert found.count(old) > 4
    assert found.count(new) > 1


def _dies_at(step: int) -> None:
    """From here on this process kills itself before the given step of writing."""
    taken = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for module, name in [
        *((os, name) for name in ("open", "replace", "rename", "fsync", "mkdir")),
        (shutil, "rmtree"),
        (atomic, "_exchange"),
    ]:
        setattr(module, name, counted(getattr(module, name)))


def test_another_checkpoint_is_refused_and_what_differs_named(made, tmp_path):
    _paths, links = made
    weights = {key: bfloat16(w) for key, w in model().items()}
    dtype, shape, raw = weights["layers.1.weight"]
    weights["layers.1.weight"] = dtype, shape, bytes([raw[0] ^ 1]) + raw[1:]
    weights["extra"] = weights.pop("layers.2.weight")
    other = write(tmp_path / "other", {"model.safetensors": weights}, **{"tokenizer.json": "[]"})
    before = contents(other)
    with pytest.raises(WrongBaseError) as refused:
        chain.apply(other, links, in_place=True)
    said = str(refused.value)
    for words in (
        f"{links[0]} does not stand on this checkpoint",
        "'layers.1.weight' holds other values",
        "'layers.2.weight' is missing",
        "'extra' is not in the one it was made on",
        "3 of 4 tensors differ",
        "Give the links that lead up to it",
    ):
        assert words in said
    assert contents(other) == before
    assert list(tmp_path.iterdir()) == [other]
    with pytest.raises(WrongBaseError, match="does not stand on this checkpoint"):
        chain.verify(links, other)


def test_links_out_of_order_or_left_out_are_refused(made, tmp_path):
    paths, links = made
    for wrong in ([links[1], links[0]], [links[0], links[2]]):
        with pytest.raises(FileFormatError, match="give the links in order, and none left out"):
            chain.apply(paths[0], wrong, tmp_path / "out")
        with pytest.raises(FileFormatError, match="does not stand on"):
            chain.verify(wrong)
    with pytest.raises(ConfigError, match="no links"):
        chain.apply(paths[0], [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_the_ones_it_stands_on(made, tmp_path):
    paths, links = made
    here = tmp_path / "here"
    shutil.copytree(paths[0], here)
    (here / "tokenizer.json").write_text("[1]")
    with pytest.raises(WrongBaseError, match=r"file 'tokenizer.json' is not as"):
        chain.apply(here, links, tmp_path / "out")
    (here / "tokenizer.json").unlink()
    with pytest.raises(WrongBaseError, match=r"file 'tokenizer.json' is missing"):
        chain.apply(here, links, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (here / "tokenizer.json").write_text("[]")
    (here / "config.json").write_text('{"step": "any"}')  # the fourth link carries it
    chain.apply(here, links, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(paths[LINKS])
    (tmp_path / "out/tokenizer.json").write_text("[1]")
    assert chain.verify(links, tmp_path / "out").other_files == ("tokenizer.json",)


def test_in_place_no_file_is_lost_that_the_links_do_not_know(made, tmp_path):
    paths, links = made
    here = tmp_path / "here"
    shutil.copytree(paths[0], here)
    (here / "README.md").write_text("mine")
    (here / "optimizer.pt").write_text("mine")
    before = contents(here)
    with pytest.raises(ConfigError, match=r"'README.md', 'optimizer.pt' would be lost"):
        chain.apply(here, links, in_place=True)
    assert contents(here) == before
    chain.apply(here, links, in_place=True, overwrite=True)
    assert contents(here) == contents(paths[LINKS])


def test_the_hubs_cache_is_not_replaced(made, tmp_path, monkeypatch):
    paths, links = made
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "_from_hub", lambda name: paths[0])
    with pytest.raises(ConfigError, match="is a name on the hub"):
        chain.apply("org/model", links, in_place=True)
    told = chain.apply("org/model", links, "out")
    assert contents(told.output) == contents(paths[LINKS])
    assert chain.verify(links, paths[0]).applied == 0


def test_a_checkpoint_left_aside_between_two_renames_is_found_again(made, tmp_path):
    paths, links = made
    shutil.copytree(paths[0], tmp_path / ".here.0123456789abcdef.old")
    told = chain.apply(tmp_path / "here", links, in_place=True)
    assert contents(told.output) == contents(paths[LINKS])
    assert os.listdir(tmp_path) == ["here"]


def test_a_file_that_a_link_drops_goes(tmp_path):
    weights = {"model.safetensors": {k: bfloat16(w) for k, w in model().items()}}
    old = write(tmp_path / "old", weights, **{"a.txt": "a", "folder": "b"})
    new = write(tmp_path / "new", weights, **{"folder/c.txt": "c"})
    chain.diff(old, new, tmp_path / "link")
    chain.apply(old, tmp_path / "link", in_place=True)
    assert contents(old) == contents(new)


def test_an_output_is_named_or_in_place(made, tmp_path):
    paths, links = made
    for options in ({}, {"in_place": True, "output": tmp_path / "out"}):
        with pytest.raises(ConfigError, match="one of the two"):
            chain.apply(paths[0], links, **options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("")
    for overwrite, says in ((False, "exists"), (True, "is a folder of something else")):
        with pytest.raises(ConfigError, match=says):
            chain.apply(paths[0], links, tmp_path / "out", overwrite=overwrite)
    with pytest.raises(ConfigError, match="is read here"):
        chain.apply(paths[0], links, paths[0], overwrite=True)
    inside = tmp_path / "model"
    shutil.copytree(paths[0], inside)
    shutil.copy(links[0], inside / "link")
    with pytest.raises(ConfigError, match=r"holds .*link, which is read here"):
        chain.apply(inside, inside / "link", in_place=True, overwrite=True)


def test_a_link_with_a_spoiled_byte_changes_nothing(made, tmp_path):
    """Whatever byte it is: refused, or (in blanks and the names of writers) the same result."""
    paths, links = made
    here = tmp_path / "here"
    shutil.copytree(paths[0], here)
    whole, rng = links[0].read_bytes(), np.random.default_rng(0)
    spoiled = tmp_path / "spoiled"
    ends = [*range(0, 1024, 41), *rng.integers(1024, len(whole), 40)]
    refused = 0
    for at in ends:
        spoiled.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        with contextlib.suppress(ShiraError):
            chain.apply(here, spoiled, tmp_path / "out", overwrite=True)
            assert contents(tmp_path / "out") == contents(paths[1])
            continue
        refused += 1
        assert contents(here) == contents(paths[0])
        with pytest.raises(FileFormatError):
            chain.verify(spoiled)
    assert refused > len(ends) // 2
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "spoiled", "out"}


def test_a_checkpoint_that_changes_meanwhile_is_refused(made, tmp_path, monkeypatch):
    paths, links = made
    here = tmp_path / "here"
    shutil.copytree(paths[0], here)
    hashes = files.Reader.hashes

    def then_changed(reader):
        found = hashes(reader)
        file = here / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        with open(file, "r+b") as opened:
            opened.write(raw)
        return found

    monkeypatch.setattr(files.Reader, "hashes", then_changed)
    with pytest.raises(FileFormatError, match="damaged: tensor"):
        chain.apply(here, links, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_is_told(made, tmp_path):
    paths, links = made
    told = []
    chain.apply(paths[0], links, tmp_path / "out", progress=lambda *counts: told.append(counts))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
