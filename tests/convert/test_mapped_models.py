# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that hold a model's parameters under other names, or in other pieces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shira import Adapter, ShiraConfig, SparseDelta, Support, Switch, get_peft_model
from shira.checkpoints import OnDisk, open_checkpoint
from shira.convert import extract, merge, to_patches, unmerge
from shira.errors import MergeError, ShiraError, WrongBaseError
from tests.convert.conftest import digests
from tests.small_models import small_model

transformers = pytest.importorskip("transformers")


def saved(model, folder, dtype=torch.bfloat16):
    """The model as it is loaded from where it was saved, in the dtypes that it is kept in."""
    first = folder.with_name("first")
    model.to(dtype).save_pretrained(first)
    type(model).from_pretrained(first, dtype=dtype).save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


def adapter_of(model, density=0.05, seed=1):
    """Deltas for every weight that is not tied to another, and none for those of words."""
    generator = torch.Generator().manual_seed(seed)
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    deltas = {}
    for name, weight in model.named_parameters():
        if uses.count(id(weight)) > 1 or not weight.numel() or not weight.is_floating_point():
            continue
        count = max(1, int(density * weight.numel()))
        flat = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
        support = Support(tuple(weight.shape), flat)
        values = 0.5 + torch.rand(count, generator=generator)
        deltas[name] = SparseDelta(support, values)
    return Adapter(deltas)


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def cycle(name, folder, **fields):
    """Merge on disk, load, compare with memory; take out; extract; return the report."""
    model = saved(small_model(name, **fields), folder / "base")
    adapter = adapter_of(model)
    adapter = untied(adapter, folder / "base")
    told = merge(adapter, folder / "base", folder / "merged", undo=folder / "undo")
    switch = Switch(model)
    switch.load("a", adapter)
    switch.activate("a")
    loaded = type(model).from_pretrained(folder / "merged", dtype=torch.bfloat16)
    assert equal(loaded.state_dict(), model.state_dict()), name
    switch.deactivate()
    unmerge(folder / "merged", folder / "undo", folder / "back")
    assert digests(folder / "back") == digests(folder / "base"), name
    found = extract(folder / "base", folder / "merged")
    assert found.exact, name
    assert set(found.adapter) <= set(adapter), name
    switch.load("found", found.adapter)
    switch.activate("found")
    assert equal(loaded.state_dict(), model.state_dict()), name
    written = load_file(folder / "base" / "model.safetensors")
    for patch in to_patches(adapter, folder / "base"):
        written[patch.name].view(-1)[patch.indices.long()] = patch.values
    assert equal(written, load_file(folder / "merged" / "model.safetensors")), name
    return told


def untied(adapter, folder):
    """The adapter without the weights that a merge refuses as tied."""
    source, kept = OnDisk(open_checkpoint(folder)), {}
    for name, delta in adapter.items():
        with contextlib.suppress(MergeError):
            source.check_untied([name])
            kept[name] = delta
    assert len(kept) > len(adapter) - 4
    return Adapter(kept)


# Of each kind of rule: prefixes, renamed parts, groups of names, experts stacked, joined,
# interleaved and transposed, queries, keys and values in one, convolutions as matrices.
@pytest.mark.parametrize(
    "name",
    [
        *("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
        *("Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        *("InternVLForConditionalGeneration", "ViTForImageClassification"),
        *("Kimi_K25ForConditionalGeneration", "GPTNeoXForCausalLM", "Dinov2Model"),
        *("MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"),
        *("Qwen3NextForCausalLM", "GraniteMoeForCausalLM", "HrmTextForCausalLM"),
        *("InklingForConditionalGeneration", "NemotronHForCausalLM", "RadioModel"),
        *("MistralLarge4ForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"),
    ],
)
def test_merged_on_disk_is_merged_in_memory(name, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip("transformers of this release has no such class")
    cycle(name, tmp_path)


@pytest.mark.slow
def test_every_class_with_rules_of_its_own(tmp_path):
    """Each class of transformers that is built from a tiny config, of at most 3M parameters.

    That takes two minutes: where `SHIRA_EVERY_CLASS` is not set, of each six classes one is tried.
    """
    step = 1 if os.environ.get("SHIRA_EVERY_CLASS") else 6
    from transformers.conversion_mapping import get_model_conversion_mapping

    done, unbuilt, wrong = [], [], []
    for name in classes()[::step]:
        try:
            with torch.device("meta"):
                model = small_model(name)
            if not get_model_conversion_mapping(model, add_legacy=False):
                continue
            assert sum(p.numel() for p in model.parameters()) < 3e6
            model = small_model(name)
            saved(model, tmp_path / name / "base")
        except Exception:  # this way of making a config small is not every class's
            unbuilt.append(name)
            continue
        if open_checkpoint(tmp_path / name / "base").places.mapped:
            try:
                cycle(name, tmp_path / name)
                done.append(name)
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(tmp_path / name)
    assert not wrong, "\n".join(wrong)
    assert len(done) > 100 // (step + step // 2), (len(done), unbuilt)


def classes():
    """Classes for which transformers has rules, as it tells from class or kind of model."""
    from transformers import conversion_mapping
    from transformers.models.auto import modeling_auto

    names = {"ViTForImageClassification"}
    for table in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"):
        found = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
        names.update(one for each in found for one in ([each] if isinstance(each, str) else each))
    rules = conversion_mapping._build_checkpoint_conversion_mapping()
    names.update(name for name in rules if hasattr(transformers, name))
    return sorted(names)


def test_names_in_the_file_are_not_the_modules(tmp_path):
    """The cycle above has something to do."""
    told = cycle("LlavaForConditionalGeneration", tmp_path)
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert name not in keys
    (one,) = (target for target in told.targets if target.name == name)
    assert one.key == "language_model.model.layers.0.self_attn.q_proj.weight"
    assert one.key in keys
    assert told.naming == (
        "the adapter's own names; the file's by LlavaForConditionalGeneration of transformers"
    )


def test_experts_one_by_one_in_the_file(tmp_path):
    told = cycle("Qwen3MoeForCausalLM", tmp_path)
    (one,) = (t for t in told.targets if t.name == "model.layers.1.mlp.experts.gate_up_proj")
    assert one.key == (
        "'model.layers.1.mlp.experts.0.gate_proj.weight', "
        "'model.layers.1.mlp.experts.1.gate_proj.weight', "
        "'model.layers.1.mlp.experts.2.gate_proj.weight' and 5 more"
    )
    assert one.nnz == int(0.05 * 4 * 64 * 32)
    assert json.loads(json.dumps(told.as_json()))["nnz"] == told.nnz


def test_the_peft_adapter_of_a_mapped_model(tmp_path):
    """Trained by PEFT, saved in its format, merged on disk: what PEFT merges in memory."""
    base, adapted = tmp_path / "base", tmp_path / "adapter"
    model = saved(small_model("LlavaForConditionalGeneration"), base)
    targets = r".*language_model.*(q_proj|down_proj)"
    model = get_peft_model(model, ShiraConfig(r=4, target_modules=targets, random_seed=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira" in name:
                parameter.normal_()
    model.save_pretrained(adapted)
    merge(adapted, base, tmp_path / "merged")
    merged = model.merge_and_unload()
    loaded = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert equal(loaded.state_dict(), merged.state_dict())


def test_the_wrong_base_is_seen_through_the_pieces(tmp_path):
    model = saved(small_model("MixtralForCausalLM"), tmp_path / "base")
    merge(adapter_of(model), tmp_path / "base", tmp_path / "merged")
    found = extract(tmp_path / "base", tmp_path / "merged").adapter
    name = "model.layers.0.mlp.experts.down_proj"
    assert name in found
    told = merge(found, tmp_path / "base", tmp_path / "again")
    assert {target.base for target in told.targets} == {"same"}
    with pytest.raises(WrongBaseError, match="wrong base"):
        merge(found, tmp_path / "merged", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_an_adapter_may_have_the_names_of_the_file(tmp_path):
    model = saved(small_model("LlavaForConditionalGeneration"), tmp_path / "base")
    adapter = adapter_of(model)
    name = next(n for n in adapter if n.endswith("post_layernorm.weight"))
    key, delta = name.removeprefix("model."), adapter[name]
    merge(Adapter({name: delta}), tmp_path / "base", tmp_path / "one")
    told = merge(Adapter({key: delta}), tmp_path / "base", tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert told.targets[0].key == key
    (patch,) = to_patches(Adapter({key: delta}), tmp_path / "base")
    assert patch.name == key


def test_two_layouts_are_compared_as_the_module_has_them(tmp_path):
    """A fine-tune that was saved with its experts joined, of a base with them one by one."""
    model = saved(small_model("Qwen3MoeForCausalLM"), tmp_path / "base")
    adapter = adapter_of(model)
    merge(adapter, tmp_path / "base", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    merged.save_pretrained(tmp_path / "joined", save_original_format=False)
    with safe_open(tmp_path / "joined" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.down_proj" in file.keys()  # noqa: SIM118
    apart = extract(tmp_path / "base", tmp_path / "merged").adapter
    joined = extract(tmp_path / "base", tmp_path / "joined").adapter
    assert apart.keys() == joined.keys()
    for name, delta in apart.items():
        assert torch.equal(delta.values, joined[name].values)
        assert torch.equal(delta.support.indices, joined[name].support.indices)
    # a single file has no config beside it: the names are read as the base's
    lone = tmp_path / "lone.safetensors"
    (tmp_path / "merged" / "model.safetensors").rename(lone)
    assert extract(tmp_path / "base", lone).adapter.keys() == apart.keys()


def test_experts_of_several_dtypes_are_refused(tmp_path):
    from safetensors.torch import save_file

    model = saved(small_model("MixtralForCausalLM"), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    save_file({**tensors, key: tensors[key].float()}, file, metadata={"format": "pt"})
    adapter = adapter_of(model)
    with pytest.raises(MergeError, match="several dtypes, BF16 and F32"):
        merge(adapter, tmp_path / "base", tmp_path / "merged")
    name = "model.layers.1.mlp.experts.down_proj"
    merge(Adapter({name: adapter[name]}), tmp_path / "base", tmp_path / "merged")
    told = extract(tmp_path / "base", tmp_path / "merged")
    assert told.not_compared == ("model.layers.0.mlp.experts.down_proj",)


def test_an_expert_that_is_missing(tmp_path):
    from safetensors.torch import save_file

    model = saved(small_model("MixtralForCausalLM"), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ShiraError, match=r"of shape \(3, .* not \(4, "):
        merge(adapter_of(model), tmp_path / "base", tmp_path / "merged")


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_experts_adapted_by_target_parameters(name, tmp_path):
    """One parameter in the model that PEFT adapted and merged, a tensor for each in the file."""
    base, adapted = tmp_path / "base", tmp_path / "adapter"
    model = saved(small_model(name), base)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = ShiraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, random_seed=3)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "shira" in key:
                parameter.normal_()
    model.save_pretrained(adapted)
    told = merge(adapted, base, tmp_path / "merged", undo=tmp_path / "undo")
    assert sum("experts" in target.name for target in told.targets) == 4
    assert {target.base for target in told.targets} == {"same"}
    merged = model.merge_and_unload()
    loaded = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert equal(loaded.state_dict(), merged.state_dict())
    unmerge(tmp_path / "merged", tmp_path / "undo", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(base)
