# SPDX-License-Identifier: Apache-2.0
"""`shira overlap`: tables, JSON, pictures, mistakes."""

from __future__ import annotations

import json

import torch

from shira import Adapter, overlap
from tests.cli.conftest import SHAPES


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
    monkeypatch.setattr(Axes, "imshow", lambda self, values, **_: drawn.append(values.tolist()))
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


def test_overlap_lists_heads(shira, headed):
    path, _ = headed
    answer = shira("overlap", path / "poems", path / "code", "--fast")
    assert "Whole tensors" in answer.out
    assert "different" in answer.out
    found = json.loads(shira("overlap", path / "poems", path / "law", "--fast", "--json").out)
    assert found["pairs"][0]["whole_tensors"] == {"score.weight": "only in a"}
