# SPDX-License-Identifier: Apache-2.0
"""Links as sparse patches: put into the old tensors, they are the new ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shira import chain
from shira.errors import ConfigError
from tests.chain.checkpoints import chain_of, changed, random_tensor, write


@pytest.fixture
def made(tmp_path):
    paths = chain_of(tmp_path, 3)
    links = [tmp_path / f"{n}.link" for n in (1, 2, 3)]
    for n, link in enumerate(links):
        chain.diff(paths[n], paths[n + 1], link)
    return paths, links


def patched(path, patches):
    tensors = load_file(path / "model.safetensors")
    for name, indices, values, shape in patches:
        assert (indices.dtype, values.dtype) == (torch.int32, tensors[name].dtype)
        assert bool((indices[1:] > indices[:-1]).all())
        assert tensors[name].shape == shape
        tensors[name].view(-1)[indices.long()] = values
    return tensors


def test_patches_make_the_new_weights(made):
    paths, links = made
    for at, given in ((0, links), (1, links), (2, links[2:])):
        now = patched(paths[at], chain.to_patches(paths[at], given))
        new = load_file(paths[3] / "model.safetensors")
        assert now.keys() == new.keys()
        assert all(torch.equal(now[key], new[key]) for key in new)
    assert chain.to_patches(paths[3], links) == []


def test_only_entries_that_change_are_told(made):
    paths, links = made
    old, new = (load_file(path / "model.safetensors") for path in paths[:2])
    for patch in chain.to_patches(paths[0], links[0]):
        where = (old[patch.name] != new[patch.name]).reshape(-1).nonzero().reshape(-1)
        assert torch.equal(patch.indices.long(), where)


def test_in_several_pieces(tmp_path, monkeypatch):
    for module in (chain.coding, chain.files, chain.applying, chain.link, chain.patches):
        monkeypatch.setattr(module, "PIECE", 64)
    rng = np.random.default_rng(0)
    old = {"w": ("F32", [50, 3], rng.standard_normal(150).astype("<f4").tobytes())}
    new = {"w": ("F32", [50, 3], rng.standard_normal(150).astype("<f4").tobytes())}
    paths = [
        write(tmp_path / name, {"model.safetensors": t}) for name, t in (("old", old), ("new", new))
    ]
    chain.diff(*paths, tmp_path / "link")
    now = patched(paths[0], chain.to_patches(paths[0], tmp_path / "link"))
    assert torch.equal(now["w"], load_file(paths[1] / "model.safetensors")["w"])


def test_what_no_patch_can_tell_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    w = random_tensor(rng, "BF16", [4, 4])
    old = {"w": w, "i": random_tensor(rng, "I64", [4]), "s": random_tensor(rng, "F32", [4, 4])}
    for number, (change, says) in enumerate(
        (
            ({"v": w}, "'v' is new"),
            ({"w": None}, "'w' is gone"),
            ({"i": changed(rng, old["i"], 1)}, "'i' is I64, not F64"),
            ({"s": ("F32", [16], old["s"][2])}, "'s' is of another dtype or shape"),
        )
    ):
        new = {key: tensor for key, tensor in {**old, **change}.items() if tensor is not None}
        folder = tmp_path / str(number)
        paths = [
            write(folder / name, {"model.safetensors": tensors})
            for name, tensors in (("old", old), ("new", new))
        ]
        chain.diff(*paths, folder / "link")
        with pytest.raises(ConfigError, match=says):
            chain.to_patches(paths[0], folder / "link")
