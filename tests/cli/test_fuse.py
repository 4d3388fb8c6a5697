# SPDX-License-Identifier: Apache-2.0
"""`shira fuse` and `shira overlap`: files, tables, JSON, pictures, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from shira import Adapter, fuse, overlap
from shira.cli.fuse import split_weight
from shira.cli.several import short_names
from shira.errors import ConfigError
from shira.fusing import METHODS
from tests.adapters import random_adapter

SHAPES = {f"layers.{i}.{kind}.weight": (16, 24) for i in range(2) for kind in ("up", "down")}


@pytest.fixture
def folders(tmp_path):
    """Three adapters on disk, and as values."""
    made = {}
    for seed, name in enumerate(("poems", "code", "law")):
        adapter = random_adapter(seed, SHAPES, k=40)
        made[name] = Adapter(dict(adapter), {"base_model_name_or_path": "some/model"})
        made[name].save(tmp_path / name, format="peft")
    return tmp_path, made


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


def test_overlap_of_two(shira, folders):
    path, made = folders
    answer = shira("overlap", path / "poems", path / "code")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.isascii()
    expected = overlap(made["poems"], made["code"])
    assert f"{expected.jaccard:.4f}" in answer.out
    assert str(expected.awor) in answer.out
    for name in SHAPES:
        assert name in answer.out


def test_overlap_as_json(shira, folders):
    path, made = folders
    found = json.loads(shira("overlap", *(path / n for n in made), "--json", "--rank").out)
    assert [a["name"] for a in found["adapters"]] == list(made)
    assert [(p["a"], p["b"]) for p in found["pairs"]] == [
        ("poems", "code"),
        ("poems", "law"),
        ("code", "law"),
    ]
    pair = [Adapter.load(path / name) for name in ("code", "law")]
    expected = overlap(*pair, names=("code", "law"))
    assert found["pairs"][2] == json.loads(json.dumps(expected.as_json()))
    assert len(found["ranks"]) == 12
    assert found["ranks"][0]["rank"] <= 16


def test_overlap_of_several(shira, folders):
    path, made = folders
    picture = path / "pairs.png"
    answer = shira(
        *("overlap", *(path / n for n in made), "--figure", "cosine", "--plot", picture, "--fast")
    )
    assert answer.status == 0, answer.err
    assert "cosine of all pairs" in answer.out
    cosine = overlap(made["poems"], made["law"], interference=False).cosine
    assert answer.out.count(f"{cosine:.4g}") >= 2  # above and below the diagonal
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "layers.0" not in answer.out
    assert "layers.0" in shira("overlap", *(path / n for n in made), "--fast", "--all").out


def test_the_picture_shows_the_figures(folders, monkeypatch):
    from matplotlib.axes import Axes

    from shira.cli.overlap import plot_matrix
    from shira.cli.several import FIGURES, all_pairs

    path, made = folders
    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda self, values, **_: drawn.append(values))
    monkeypatch.setattr("matplotlib.figure.Figure.colorbar", lambda *_, **__: None)
    found = all_pairs(list(made.values()), list(made), interference=True, seed=0, check_base=True)
    for figure, of in FIGURES.items():
        plot_matrix(list(made), found, figure, path / "x.png")
        values = torch.tensor(drawn[-1])
        assert values.diagonal().isnan().all()
        reach = max(abs(of(pair)) for pair in found) or 1.0
        assert values[0, 1] == values[1, 0] == torch.tensor(of(found[0]) / reach)
        assert values[1, 2] == values[2, 1] == torch.tensor(of(found[2]) / reach)


def test_rank_of_one(shira, folders):
    path, _ = folders
    answer = shira("overlap", path / "poems", "--rank")
    assert answer.status == 0
    assert answer.out.count("layers.") == 4
    assert "Pairs" not in answer.out


def test_overlap_mistakes(shira, folders):
    path, _ = folders
    for arguments, message in [
        ((path / "poems",), "two adapters or more"),
        ((path / "poems", "--rank", "--plot", path / "x.png"), "two adapters or more"),
        ((path / "poems", path / "code", "--figure", "jacard"), "Did you mean 'jaccard'"),
        ((path / "poems", path / "code", "--figure", "awor", "--fast"), "leaves out"),
        ((path / "poems", path / "code", "--plot", path / "no" / "x.png"), "there is no folder"),
    ]:
        answer = shira("overlap", *arguments)
        assert answer.status == 2
        assert message in answer.err


def test_help_names_every_method(shira):
    text = shira("fuse", "--help").out
    for method in METHODS:
        assert f"{method}:" in text


def test_weights_of_paths(tmp_path):
    assert split_weight("a") == ("a", None)
    assert split_weight("a=0.5") == ("a", 0.5)
    assert split_weight("dir=x/a=-2e-1") == ("dir=x/a", -0.2)
    (tmp_path / "lr=3").mkdir()
    assert split_weight(f"{tmp_path}/lr=3") == (f"{tmp_path}/lr=3", None)
    assert split_weight(f"{tmp_path}/lr=3=2") == (f"{tmp_path}/lr=3", 2.0)
    with pytest.raises(ConfigError):
        split_weight("a=b")


def test_short_names():
    assert short_names(["x/a", "x/b"]) == ["a", "b"]
    assert short_names(["x/a", "y/a", "b"]) == ["x/a", "y/a", "b"]
    assert short_names(["x/a", "x/a"]) == ["a (1)", "a (2)"]
    assert short_names(["x/a", "y/a", "x/../x/a"]) == ["x/a (1)", "y/a", "x/a (2)"]


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


@pytest.fixture
def headed(tmp_path):
    """Two adapters that trained different heads, and one without."""
    made = {}
    for seed, name in enumerate(("poems", "code", "law")):
        head = {} if name == "law" else {"score.weight": torch.full((2, 3), float(seed))}
        made[name] = Adapter(random_adapter(seed, SHAPES, k=40), None, head)
        made[name].save(tmp_path / name, format="peft")
    return tmp_path, made


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
    assert (answer.status, "is 0 of the adapters" in answer.err) == (2, True)


def test_a_head_that_one_alone_has_is_carried(shira, headed):
    path, made = headed
    answer = shira("fuse", path / "poems", path / "law", "-o", path / "both", "--json")
    assert json.loads(answer.out)["whole_tensors"] == ["score.weight"]
    assert Adapter.load(path / "both") == made["poems"] + made["law"]
    answer = shira("fuse", f"{path / 'poems'}=0.5", path / "law", "-o", path / "half")
    assert (answer.status, "have no scale" in answer.err) == (2, True)


def test_overlap_lists_heads(shira, headed):
    path, _ = headed
    answer = shira("overlap", path / "poems", path / "code", "--fast")
    assert "Whole tensors" in answer.out
    assert "different" in answer.out
    found = json.loads(shira("overlap", path / "poems", path / "law", "--fast", "--json").out)
    assert found["pairs"][0]["whole_tensors"] == {"score.weight": "only in a"}
