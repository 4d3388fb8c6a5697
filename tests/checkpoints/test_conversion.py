# SPDX-License-Identifier: Apache-2.0
"""Places of parameters: what is joined and split is followed entry by entry, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shira.checkpoints import OnDisk, open_checkpoint, shapes_of
from shira.checkpoints.conversion import (
    AS_STORED,
    Place,
    _checked,
    _mapped,
    _model_of,
    _Trace,
    places_of,
)
from shira.checkpoints.entries import read_blocks, read_entries
from shira.errors import MergeError, WrongBaseError
from shira.store.header import Stored
from tests.small_models import small_model

transformers = pytest.importorskip("transformers")


def stored(key: str, shape: tuple[int, ...]) -> Stored:
    return Stored(key, Path("f"), "F32", shape, 0, 0)


@st.composite
def programs(draw):
    """Operations that move entries, each of the last tensor and others of its shape."""
    kinds = ["stack", "cat", "transpose", "chunk", "reshape", "clone", "select"]
    return draw(st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 5)), max_size=6))


def run(program, sources):
    """Apply a program to tensors of one shape."""
    tensor, *others = sources
    for kind, number in program:
        dim = number % max(tensor.dim(), 1)
        if kind in ("stack", "cat"):
            same = [other for other in others if other.shape == tensor.shape]
            tensor = getattr(torch, kind)([*same, tensor], dim=dim)
        elif kind == "transpose":
            tensor = tensor.transpose(0, dim)
        elif kind == "chunk":
            tensor = tensor.chunk(2, dim=dim)[number % 2 if tensor.shape[dim] > 1 else 0]
        elif kind == "reshape":
            tensor = tensor.reshape(tensor.shape[0], -1)
        elif kind == "clone":
            tensor = tensor.contiguous().clone()
        elif tensor.dim() > 1:
            tensor = tensor.unbind(dim)[0]
    return tensor


@settings(deadline=None, max_examples=150)
@given(
    program=programs(),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    density=st.floats(0, 1),
)
def test_entries_are_followed_through_any_moves(program, shape, density):
    """Against the same operations on tensors whose entries are numbered."""
    shape = tuple(shape)
    size = torch.Size(shape).numel()
    numbered = [torch.arange(size).view(shape) + 1000 * i for i in range(3)]
    probes = {str(i): torch.empty(shape, device="meta") for i in range(3)}
    trace = _Trace({key: (probe, stored(key, shape)) for key, probe in probes.items()})
    with trace:
        made = run(program, list(probes.values()))
    expected = run(program, numbered)
    place = Place(tuple(made.shape), trace.source_of(made))
    flat = (torch.rand(expected.numel()) <= density).nonzero().squeeze(1)
    found = torch.full((flat.numel(),), -1)
    for tensor, entries, at in place.split(flat):
        assert bool((at[1:] > at[:-1]).all())
        found[entries] = at + 1000 * int(tensor.key)
    assert torch.equal(found, expected.reshape(-1)[flat])


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (lambda a, b: a + b, "aten.add"),
        (lambda a, b: torch.cat([a, b * 2]), "aten.cat"),
        (lambda a, b: a.half(), "_to_copy"),
        (lambda a, b: torch.cat([a.double(), b.double()]), "aten.cat"),
        (lambda a, b: a.flip(0), "aten.flip"),
        (lambda a, b: a.expand(2, 2, 3), "overlap"),
    ],
)
def test_what_is_computed_has_no_place(compute, named):
    probes = [torch.empty(2, 3, device="meta") for _ in range(2)]
    trace = _Trace({str(i): (probe, stored(str(i), (2, 3))) for i, probe in enumerate(probes)})
    with trace:
        made = compute(*probes)
    with pytest.raises(ValueError, match=named):
        trace.source_of(made)


CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    **{"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "vocab_size": 11},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3},
}
NAME = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def experts(tmp_path) -> Path:
    torch.manual_seed(0)
    file = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"
    tensors = {file.format(e, w): torch.randn(6, 8) for e in range(3) for w in (1, 3)}
    tensors |= {file.format(e, 2): torch.randn(8, 6) for e in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_parameter_in_pieces_is_read_in_entries_and_in_blocks(experts):
    checkpoint = open_checkpoint(experts)
    assert shapes_of(checkpoint) == {
        NAME: (3, 12, 8),
        "model.layers.0.mlp.experts.down_proj": (3, 8, 6),
    }
    place = checkpoint.places.by_name[NAME]
    held = {
        key: read_entries(t, torch.arange(48)).view(6, 8)
        for key, t in checkpoint.tensors.items()
        if "w2" not in key
    }
    key = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"
    whole = torch.stack(
        [torch.cat([held[key.format(e, 1)], held[key.format(e, 3)]]) for e in range(3)]
    )
    flat = torch.tensor([0, 47, 48, 95, 96, 200, 287])
    assert torch.equal(read_entries(place, flat), whole.view(-1)[flat])
    assert torch.equal(torch.cat([*read_blocks(place, 7)]), whole.view(-1))
    assert len(place.split(flat)) == 5  # no tensor without an entry
    assert place.file == "model.safetensors"


def test_a_part_of_the_experts_is_not_taken_for_all(experts):
    """One shard of several: its first expert may be any one of the model's."""
    tensors = load_file(experts / "model.safetensors")
    some = {key: tensor for key, tensor in tensors.items() if ".experts.0." not in key}
    save_file(some, experts / "model.safetensors")
    checkpoint = open_checkpoint(experts)
    assert shapes_of(checkpoint)[NAME] == (3, 12, 8)
    with pytest.raises(MergeError, match=r"of shape \(2, 12, 8\), not \(3, 12, 8\)"):
        checkpoint.places.by_name[NAME].split(torch.arange(3))
    assert NAME in OnDisk(checkpoint).others


def test_names_are_taken_as_they_are_where_no_model_is_told(experts):
    (experts / "config.json").unlink()
    checkpoint = open_checkpoint(experts)
    assert checkpoint.places.by_name.keys() == checkpoint.tensors.keys()
    assert not checkpoint.places.reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "of-tomorrow"}, "KeyError"),
        ({**CONFIG, "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"model_type": "llava", "text_config": {"num_layers": 1e12}}, "num_layers is"),
        ({"model_type": "swin", "depths": [2, 10**7]}, "depths is 10000002"),
        ({"model_type": "swin", "depths": [1] * 10**5}, "depths is 100000"),
        ({**CONFIG, "num_labels": 10**10}, "num_labels is"),
        ({"model_type": "dpt", "backbone": "some/one"}, "backbone is 'some/one'"),
        ({"model_type": "timm_wrapper", "architecture": "hf-hub:some/one"}, "looked for elsewhere"),
        ({**CONFIG, "num_attention_heads": "many"}, "Error"),
    ],
)
def test_a_model_that_cannot_be_made_is_told_of_where_names_are_missing(experts, config, reason):
    (experts / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(experts)
    assert checkpoint.places.by_name.keys() == checkpoint.tensors.keys()
    assert reason in checkpoint.places.reason
    with pytest.raises(WrongBaseError, match=r"transformers.*could not be asked"):
        shapes_of(checkpoint, [NAME])


def test_the_class_is_one_of_transformers_alone(experts):
    """A name from a file picks no other object of the package."""
    for name in ("pipeline", "AutoModel", "__name__", "MixtralConfig", 3):
        (experts / "config.json").write_text(json.dumps({**CONFIG, "architectures": [name]}))
        assert "layers.0.mlp.experts.gate_up_proj" in open_checkpoint(experts).places.by_name


def test_what_the_model_does_not_load_keeps_its_name():
    tensors = {"mtp.weight": stored("mtp.weight", (2, 2))}
    places = places_of(CONFIG, tensors)
    assert places.by_name["mtp.weight"].stored == (tensors["mtp.weight"],)


def test_without_transformers_names_are_taken_as_they_are(experts, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    checkpoint = open_checkpoint(experts)
    assert "import of transformers halted" in checkpoint.places.reason


def test_operations_that_compute_are_refused_when_the_parameter_is_used(experts, monkeypatch):
    from transformers.core_model_loading import MergeModulelist

    def mean(self, input_dict, *args, **kwargs):
        return {key: sum(tensors) for key, tensors in input_dict.items()}

    monkeypatch.setattr(MergeModulelist, "convert", mean)
    checkpoint = open_checkpoint(experts)
    place = checkpoint.places.by_name[NAME]
    with pytest.raises(
        MergeError, match=r"MergeModulelist, Concatenate.*save_original_format=False"
    ):
        place.split(torch.arange(3))


def test_models_that_are_not_asked_about_have_the_names_of_their_files(tmp_path):
    """What transformers says of each, where it is asked."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    for kind in sorted(AS_STORED):
        small_model(CLASSES[kind]).save_pretrained(tmp_path / kind)
        checkpoint = open_checkpoint(tmp_path / kind)
        assert checkpoint.config["model_type"] == kind
        model = _model_of(checkpoint.config, len(checkpoint.tensors))
        found = _mapped(model, checkpoint.tensors)
        assert found == checkpoint.as_stored
        assert found.keys() >= {name for name, _ in model.named_parameters()}


def test_transformers_is_not_imported_for_a_model_of_such_names(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from shira.checkpoints import shapes_of\n"
        f"print(shapes_of({str(tmp_path)!r}), 'transformers' in sys.modules)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.strip() == "{'model.norm.weight': (3,)} False"


def test_nothing_in_a_config_runs_code_of_others(experts, monkeypatch):
    """Kernels for attention come from the hub, and classes beside a checkpoint are code."""
    asked = {"attn_implementation": "some/kernels", "_attn_implementation": "some/kernels"}
    asked |= {"experts_implementation": "some/kernels", "trust_remote_code": True}
    asked |= {"auto_map": {"AutoModel": "some/one--code.Class"}}
    told = _checked({**CONFIG, **asked, "text_config": {"model_type": "llama", **asked}}, 100)
    assert told == {**CONFIG, "text_config": {"model_type": "llama"}}
    (experts / "config.json").write_text(json.dumps({**CONFIG, **asked}))
    assert NAME in open_checkpoint(experts).places.by_name
