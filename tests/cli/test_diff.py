# SPDX-License-Identifier: Apache-2.0
"""`shira diff`, `shira apply` and `shira verify`: a chain on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shira import chain
from shira.convert import load_patches
from tests.chain.checkpoints import chain_of, contents


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Checkpoints 0 to 3 and, as 1.link and 2.link, the first two links."""
    monkeypatch.chdir(tmp_path)
    chain_of(tmp_path, 3)
    for n in (1, 2):
        chain.diff(str(n - 1), str(n), f"{n}.link")


def test_a_chain(made, shira):
    told = shira("diff", "2", "3", "-o", "3.link")
    assert told.status == 0
    assert "bytes a changed entry" in told.out
    assert "files carried" in told.out  # the config counts threes
    assert "layers.0.weight" in told.out
    told = shira("apply", "1", "1.link", "2.link", "3.link", "--output", "out")
    assert told.status == 0
    assert "2 applied, 1 were in it already" in told.out
    assert contents(Path("out")) == contents(Path("3"))
    told = shira("verify", "1.link", "2.link", "3.link", "--checkpoint", "2")
    assert told.status == 0
    assert "3, sound and in order" in told.out
    assert "2 has 2 of them in it" in told.out
    Path("out/tokenizer.json").write_text("[3]")
    told = shira("verify", "3.link", "--checkpoint", "out")
    assert "not what the links say: 'tokenizer.json'" in told.out


def test_in_place(made, shira):
    assert shira("apply", "0", "1.link", "2.link", "--in-place").status == 0
    assert contents(Path("0")) == contents(Path("2"))


def test_json(made, shira):
    told = json.loads(shira("diff", "2", "3", "-o", "3.link", "--json").out)
    assert told["size"] == Path("3.link").stat().st_size
    assert told["carried"] == ["config.json"]
    applied = json.loads(shira("apply", "2", "3.link", "-o", "out", "--json").out)
    assert (applied["output"], applied["hash"]) == (str(Path("out").resolve()), told["new"])
    found = json.loads(shira("verify", "3.link", "--checkpoint", "out", "--json").out)
    assert (found["applied"], found["old"], found["new"]) == (1, told["old"], told["new"])


def test_patches(made, shira):
    line = ("apply", "0", "2.link", "--format", "patch", "-o", "patch")
    assert "does not stand on" in shira(*line).err
    line = ("apply", "1", "2.link", "--format", "patch", "-o", "patch")
    assert "in 4 weights" in shira(*line).out
    tensors, new = (load_file(f"{number}/model.safetensors") for number in (1, 2))
    for name, indices, values, _ in load_patches("patch"):
        tensors[name].view(-1)[indices.long()] = values
    assert all(torch.equal(tensors[name], new[name]) for name in new)
    told = json.loads(shira(*line, "--overwrite", "--json").out)
    assert (told["weights"], told["bytes"]) == (4, Path("patch").stat().st_size)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("apply 0 2.link -o out", "does not stand on this checkpoint"),
        ("apply 0 2.link 1.link -o out", "give the links in order"),
        ("apply 0 1.link", "name an output, or ask for in_place (--in-place)"),
        ("apply 0 1.link -o 1", "output .* exists"),
        ("apply 0 1.link -o 0 --overwrite", "is read here"),
        ("apply 0 0/model.safetensors -o out", "no link of a chain"),
        ("apply 0 none.link -o out", "none.link"),
        ("apply 0 1.link -o out --format peft", "--format is one of checkpoint, patch"),
        ("apply 0 1.link --format patch", "name it (--output)"),
        ("apply 0 1.link --format patch --in-place -o out", "name it (--output)"),
        ("apply 0 1.link -o 2.link --format patch", "2.link exists"),
        ("apply 0 1.link -o 1.link --format patch --overwrite", "is read here"),
        ("diff 0 1 -o 1.link", "1.link exists"),
        ("diff 0 1 -o 1/new.link", "lies in the checkpoint"),
        ("diff 0 none -o new.link", "none"),
        ("verify 1.link --checkpoint 3", "does not stand on this checkpoint"),
    ],
)
def test_what_is_refused_changes_nothing(made, shira, line, says):
    before = contents(Path())
    told = shira(*line.split())
    assert told.status == 2
    assert re.search(re.escape(says).replace(r"\.\*", ".*"), told.err), told.err
    assert "Traceback" not in told.err
    assert contents(Path()) == before
