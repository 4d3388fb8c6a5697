# SPDX-License-Identifier: Apache-2.0
"""`shira fuse`: files, JSON, mistakes; with `shira overlap`, other bases and what is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from shira import Adapter, fuse
from shira.cli.fuse import split_weight
from shira.errors import ConfigError
from shira.fusing import METHODS
from tests.adapters import random_adapter


def test_fuse_writes_what_fuse_makes(shira, folders):
    path, made = folders
    answer = shira("fuse", f"{path / 'poems'}=0.7", path / "code", "-o", path / "both")
    assert (answer.status, answer.err) == (0, "")
    expected = fuse([made["poems"], made["code"]], [0.7, 1.0])
    found = Adapter.load(path / "both")
    assert found == expected
    made_of = [(part["name"], part["weight"]) for part in found.metadata["fused"]["from"]]
    assert made_of == [("poems", 0.7), ("code", 1.0)]
    assert f"{expected.nnz:,} entries in 4 weights" in answer.out
    assert "by sum from 2 adapters of 320 entries together" in answer.out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_its_options(shira, folders, method):
    path, made = folders
    values = {"density": 0.4, "epsilon": 0.1, "seed": 5, "majority_sign_method": "frequency"}
    given = {option: values[option] for option in METHODS[method].options if option in values}
    flags = [f"--{option.replace('_', '-')}={value}" for option, value in given.items()]
    answer = shira("fuse", *(path / n for n in made), "-m", method, *flags, "-o", path / "all")
    assert answer.status == 0, answer.err
    assert Adapter.load(path / "all") == fuse(list(made.values()), method=method, **given)


def test_fuse_as_json_in_another_dtype(shira, folders):
    path, made = folders
    found = json.loads(
        shira(
            *("fuse", path / "poems", path / "law", "-o", path / "x", "--method", "magnitude"),
            *("--k", 10, "--dtype", "bfloat16", "--format", "peft", "--json"),
        ).out
    )
    assert (found["nnz"], found["fused"]["k"], found["parameters"]) == (10, 10, 4)
    again = Adapter.load(path / "x")
    assert {d.values.dtype for d in again.values()} == {torch.bfloat16}
    assert again == fuse(list(made.values())[::2], method="magnitude", k=10).to(torch.bfloat16)


def test_fill_for_peft(shira, folders):
    path, made = folders
    options = ("-o", path / "both", "--fill", "--format", "peft")
    assert shira("fuse", path / "poems", path / "code", *options).status == 0
    filled = Adapter.load(path / "both")
    assert {d.nnz for d in filled.values()} == {2 * (16 + 24)}
    assert filled.compare(fuse([made["poems"], made["code"]])).largest_difference == 0
    assert json.loads((path / "both" / "adapter_config.json").read_text())["r"] == 2
    full = random_adapter(9, {"w.weight": (4, 6)}, k=24)
    full.save(path / "full", format="peft")
    answer = shira("fuse", path / "full", "-o", path / "no", "--fill")
    assert (answer.status, "'w.weight' of shape (4, 6)" in answer.err) == (2, True)
    assert not (path / "no").exists()


def test_mistakes_write_nothing(shira, folders):
    path, _ = folders
    out = ("-o", path / "out")
    for arguments, message in [
        ((path / "poems", path / "none"), "no such file"),
        ((path / "poems", f"{path / 'code'}=x"), "'x' is no weight"),
        ((path / "poems", path / "code", "-m", "tie"), "Did you mean 'ties'"),
        ((path / "poems", path / "code", "--density", 0.5), "no option 'density'"),
        ((path / "poems", path / "code", "--dtype", "bf16"), "--dtype is one of float32, bfloat16"),
    ]:
        answer = shira("fuse", *arguments, *out)
        assert answer.status == 2
        assert message in answer.err
        assert answer.err.count("\n") == 1
        assert answer.out == ""
    assert not (path / "out").exists()
    (path / "out").mkdir()
    answer = shira("fuse", path / "poems", path / "code", *out)
    assert (answer.status, "--overwrite" in answer.err) == (2, True)
    assert shira("fuse", path / "poems", path / "code", *out, "--overwrite").status == 0


def test_other_bases(shira, folders):
    path, made = folders
    other = Adapter(dict(made["law"]), {"base_model_name_or_path": "another/model"})
    other.save(path / "other", format="peft")
    for command in (("fuse", "-o", path / "x"), ("overlap",)):
        answer = shira(*command, path / "poems", path / "other")
        assert answer.status == 2
        assert "poems was trained on" in answer.err
        assert "'another/model'" in answer.err
        assert shira(*command, path / "poems", path / "other", "--no-check-base").status == 0


def test_help_names_every_method(shira):
    text = shira("fuse", "--help").out
    for method in METHODS:
        assert f"{method}:" in text


def test_weights_of_paths(tmp_path):
    assert split_weight("a") == ("a", 1.0)
    assert split_weight("a=0.5") == ("a", 0.5)
    assert split_weight("dir=x/a=-2e-1") == ("dir=x/a", -0.2)
    (tmp_path / "lr=3").mkdir()
    assert split_weight(f"{tmp_path}/lr=3") == (f"{tmp_path}/lr=3", 1.0)
    assert split_weight(f"{tmp_path}/lr=3=2") == (f"{tmp_path}/lr=3", 2.0)
    with pytest.raises(ConfigError):
        split_weight("a=b")


def test_need_the_core_alone(folders):
    path, _ = folders
    code = (
        "import sys\n"
        "from shira.cli import main\n"
        f"arguments = [{str(path / 'poems')!r}, {str(path / 'code')!r}]\n"
        f"for command in (['fuse', '-o', {str(path / 'x')!r}], ['overlap']):\n"
        "    try: main([*command, *arguments])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "print('MODULES', *sys.modules)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    loaded = {name.partition(".")[0] for name in out.partition("MODULES")[2].split()}
    assert not {"peft", "transformers", "accelerate", "matplotlib"} & loaded


# ---------------------------------------------------------------------------------- whole tensors


def test_fuse_of_two_heads_is_told_which(shira, headed):
    path, made = headed
    parts = [path / "poems", path / "code"]
    answer = shira("fuse", *parts, "-o", path / "both")
    assert answer.status == 2
    assert "poems and code hold different tensors for the whole of 'score.weight'" in answer.err
    assert not (path / "both").exists()
    answer = shira("fuse", *parts, "-o", path / "both", "--whole", path / "code")
    assert (answer.status, answer.err) == (0, "")
    assert "whole tensors, carried as they are: score.weight" in answer.out
    assert Adapter.load(path / "both") == fuse(
        [made["poems"], made["code"]], names=["poems", "code"], whole="code"
    )
    answer = shira("fuse", *parts, "-o", path / "no", "--whole", path / "law")
    assert (answer.status, "is no adapter here" in answer.err) == (2, True)


def test_a_head_that_one_alone_has_is_carried(shira, headed):
    path, made = headed
    answer = shira("fuse", path / "poems", path / "law", "-o", path / "both", "--json")
    assert json.loads(answer.out)["whole_tensors"] == ["score.weight"]
    assert Adapter.load(path / "both") == made["poems"] + made["law"]
    answer = shira("fuse", f"{path / 'poems'}=0.5", path / "law", "-o", path / "half")
    assert (answer.status, "have no scale" in answer.err) == (2, True)
