# SPDX-License-Identifier: Apache-2.0
"""Base models that Accelerate offloads: training, masks, loading and merging as in memory."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from shira import Adapter, PeftModel, ShiraConfig, get_peft_model
from shira.errors import MaskError, TargetError

from .models import llama, randomize

CPU = torch.device("cpu")


def config(**options):
    targets = ["q_proj", "v_proj", "down_proj"]
    return ShiraConfig(density=0.13, target_modules=targets, random_seed=0, **options)


def offloaded(kind, path):
    model = llama()
    if kind == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if kind == "disk":
        disk_offload(model, str(path / "disk"), execution_device=CPU)
        return model
    from transformers import LlamaForCausalLM

    model.save_pretrained(path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    return LlamaForCausalLM.from_pretrained(
        path / "model", device_map=places, offload_folder=str(path / "folder")
    )


def step(model):
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def assert_same_step(model, want):
    loss, grads = step(model)
    assert torch.equal(loss, want[0])
    assert grads.keys() == want[1].keys()
    assert all(torch.equal(grads[name], want[1][name]) for name in grads)


@pytest.mark.parametrize("mask", ["random", "magnitude"])
@pytest.mark.parametrize("kind", ["cpu", "disk", "device_map"])
def test_an_adapter_on_an_offloaded_base(tmp_path, kind, mask):
    in_memory = get_peft_model(llama(), config(mask_type=mask))
    randomize(in_memory, scale=0.1)
    want = step(in_memory)

    model = get_peft_model(offloaded(kind, tmp_path), config(mask_type=mask))
    randomize(model, scale=0.1)
    assert any(p.is_meta for p in model.parameters())
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    assert_same_step(model, want)
    assert Adapter.from_model(model) == Adapter.from_model(in_memory)
    fingerprints = [m.peft_config["default"].base_fingerprint for m in (model, in_memory)]
    assert fingerprints[0] == fingerprints[1] is not None


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_loading_and_merging_on_an_offloaded_base(tmp_path, kind):
    in_memory = get_peft_model(llama(), config())
    randomize(in_memory, scale=0.1)
    in_memory.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        offloaded(kind, tmp_path), tmp_path / "adapter", is_trainable=True
    )
    assert_same_step(model, step(in_memory))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want, bare = in_memory(ids).logits, llama()(ids).logits
        model.merge_adapter()
        assert torch.equal(model(ids).logits, want)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, bare)


def test_an_adapted_model_that_is_offloaded_afterwards():
    model = get_peft_model(llama(), config())
    randomize(model, scale=0.1)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want = model(ids).logits
        cpu_offload(model, execution_device=CPU)
        assert torch.equal(model(ids).logits, want)
    with pytest.raises(TargetError, match="offload the base model first"):
        model(ids)


def test_a_base_without_weights():
    """Positions can be chosen where there are no weights yet; by weights, of course not."""
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(MaskError, match=r"q_proj.weight: the weight is on the meta device"):
        get_peft_model(empty, config(mask_type="magnitude"))
    assert not any("shira" in name for name, _ in empty.named_modules())
    model = get_peft_model(empty, config())
    indices = {n: b for n, b in model.named_buffers() if "shira_indices" in n}
    want = dict(get_peft_model(llama(), config()).named_buffers())
    assert indices
    assert all(torch.equal(value, want[name]) for name, value in indices.items())
    assert model.peft_config["default"].base_fingerprint is None
