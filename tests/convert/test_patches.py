# SPDX-License-Identifier: Apache-2.0
"""Sparse weight patches in vLLM's coordinates: values, files, refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from shira import Adapter, ShiraError, SparseDelta, Support
from shira.convert import load_patches, merge, save_patches, to_patches
from shira.errors import AdapterError, FileFormatError, MergeError, WrongBaseError
from tests.convert.conftest import applied, load, make_adapter


@dataclass
class SparseWeightPatch:  # the fields of vLLM's class of this name
    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple[int, ...]


def patched(tensors, patches):
    """What an engine does: values in the place of the entries."""
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    for patch in patches:
        theirs = SparseWeightPatch(**patch._asdict())
        assert theirs.indices.dtype == torch.int32
        assert theirs.full_shape == tuple(result[theirs.name].shape)
        result[theirs.name].view(-1)[theirs.indices.long()] = theirs.values
    return result


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_patching_gives_the_merged_weights(checkpoint, tensors, adapter, tmp_path, scale):
    patches = to_patches(adapter, checkpoint, scale=scale)
    wanted = applied(tensors, adapter, scale)
    assert all(patch.values.dtype == tensors[patch.name].dtype for patch in patches)
    result = patched(tensors, patches)
    assert all(torch.equal(result[name], wanted[name]) for name in wanted)
    merge(adapter, checkpoint, tmp_path / "merged", scale=scale)
    merged = load(tmp_path / "merged")
    assert all(torch.equal(result[name], merged[name]) for name in wanted)


def test_a_patch_file_comes_back(checkpoint, tensors, adapter, tmp_path):
    patches = to_patches(adapter, checkpoint)
    save_patches(patches, tmp_path / "new" / "patch.safetensors")
    for there, back in zip(patches, load_patches(tmp_path / "new/patch.safetensors"), strict=True):
        assert (there.name, there.full_shape) == (back.name, back.full_shape)
        assert torch.equal(there.indices, back.indices)
        assert torch.equal(there.values, back.values)
        assert there.values.dtype == back.values.dtype
    with safe_open(tmp_path / "new/patch.safetensors", "pt") as file:  # as documented
        about = file.metadata()
        assert (about["format"], about["version"]) == ("shira-sparse-patch", "1")
        assert json.loads(about["shapes"]).keys() == adapter.keys()
        assert set(file.keys()) == {f"{n}.{k}" for n in adapter for k in ("indices", "values")}


def test_modules_and_prefixes(tensors):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    adapter = make_adapter(dict(model.state_dict()), ["0.weight", "1.weight"], k=3)
    result = patched(model.state_dict(), to_patches(adapter, model))
    wanted = applied(dict(model.state_dict()), adapter)
    assert all(torch.equal(result[name], wanted[name]) for name in wanted)
    prefixed = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert [p.name for p in to_patches(adapter, prefixed)] == ["model.0.weight", "model.1.weight"]
    model[1].weight.data = model[1].weight.data.t().contiguous().t()  # stored column by column
    assert torch.equal(
        to_patches(adapter, model)[1].values, to_patches(adapter, prefixed)[1].values
    )


def test_bases_that_do_not_fit(tensors, adapter):
    assert to_patches(Adapter({}), tensors) == []
    less = {name: tensor for name, tensor in tensors.items() if name != "model.layers.0.q.weight"}
    with pytest.raises(WrongBaseError, match=r"there is no 'model.layers.0.q.weight'"):
        to_patches(adapter, less)
    less["model.layers.0.q.weight"] = torch.ones(8, 8, dtype=torch.int8)
    with pytest.raises(WrongBaseError, match=r"it has one of torch.int8"):
        to_patches(adapter, less)
    less["model.layers.0.q.weight"] = torch.ones(8, 9)
    with pytest.raises(WrongBaseError, match=r"has shape \(8, 9\)"):
        to_patches(adapter, less)
    less["model.layers.0.q.weight"] = tensors["model.layers.0.q.weight"] + 1
    with pytest.raises(WrongBaseError, match="wrong base"):
        to_patches(adapter, less)
    to_patches(adapter, less, check_base=False)


def test_tied_weights_are_refused(tmp_path):
    model = nn.ModuleDict({"wte": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    adapters = [make_adapter(model.state_dict(), [name]) for name in ("wte.weight", "head.weight")]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    told = {"architectures": ["XForCausalLM"], "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for adapter in adapters:
        for base in (model, model.state_dict(), tmp_path):
            assert len(to_patches(adapter, base)) == 1
    model["head"].weight = model["wte"].weight
    save_file({"wte.weight": model["wte"].weight.detach()}, tmp_path / "model.safetensors")
    for adapter in adapters:
        for base in (model, model.state_dict()):
            with pytest.raises(MergeError, match="is tied: it is the same tensor as"):
                to_patches(adapter, base, check_base=False)
    with pytest.raises(
        MergeError, match=r"'wte.weight' is tied: the checkpoint has no output head"
    ):
        to_patches(adapters[0], tmp_path, check_base=False)
    with pytest.raises(WrongBaseError, match=r"there is no 'head.weight'"):
        to_patches(adapters[1], tmp_path, check_base=False)


def test_weights_that_int32_cannot_count():
    shape = (2**16, 2**15)
    delta = SparseDelta(Support(shape, torch.tensor([5])), torch.ones(1))
    base = {"w": torch.zeros(1).expand(shape)}
    with pytest.raises(AdapterError, match="more than a patch's int32 indices"):
        to_patches(Adapter({"w": delta}), base)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, m: m.update(format="x"), "not a file of sparse weight patches"),
        (lambda t, m: m.update(version="2"), "version '2'"),
        (lambda t, m: m.update(shapes="{"), "not valid JSON"),
        (lambda t, m: m.update(shapes='{"w": [1]}'), "outside a weight of shape"),
        (lambda t, m: m.update(shapes='{"w": "x"}'), "the shape is a list"),
        (lambda t, m: m.update(shapes='{"w": [4], "v": [4]}'), "'v.indices' is missing"),
        (lambda t, m: t.update({"w.indices": torch.tensor([2, 1]).int()}), "sorted and unique"),
        (lambda t, m: t.update({"w.indices": torch.tensor([1, 2])}), "indices are int32"),
        (lambda t, m: t.update({"w.values": torch.ones(3)}), "need values of shape"),
        (lambda t, m: t.update({"w.values": torch.ones(2).int()}), "values are F64, F32"),
    ],
)
def test_damaged_patch_files(tmp_path, change, match):
    path = tmp_path / "patch"
    base = {"w": torch.zeros(4)}
    delta = SparseDelta(Support((4,), torch.tensor([1, 2])), torch.ones(2))
    save_patches(to_patches(Adapter({"w": delta}), base), path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FileFormatError, match=match) as caught:
        load_patches(path)
    assert isinstance(caught.value, ShiraError)
