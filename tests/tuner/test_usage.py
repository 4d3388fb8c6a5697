# SPDX-License-Identifier: Apache-2.0
"""The four usage examples of PEFT's documentation of SHiRA, on small models, with our import."""

from __future__ import annotations

import pytest
import torch

from shira import PeftModel, ShiraConfig, get_peft_model

from .models import base_weights, gpt2, opt, same_weights, t5


def train(model, batch, steps=3):
    """A few steps; the loss falls, and the base stays."""
    before = base_weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = base_weights(model)
    assert same_weights(before, after)


def round_trip(model, make, batch, path):
    """Saved and loaded on a fresh base, the adapter computes the same bits."""
    model.eval()
    model.save_pretrained(path)
    again = PeftModel.from_pretrained(make(), path).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def ids(*shape):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(0))


def test_basic_opt(tmp_path):
    config = ShiraConfig(r=2, target_modules=["q_proj", "v_proj"], random_seed=42)
    model = get_peft_model(opt(), config)
    batch = {"input_ids": ids(2, 9), "labels": ids(2, 9)}
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"q_proj", "v_proj"}
    assert all(
        p.numel() == 2 * (16 + 16) for n, p in model.named_parameters() if "shira_weight" in n
    )
    train(model, batch)
    round_trip(model, opt, batch, tmp_path)


def test_regex_targets_and_modules_to_save_t5(tmp_path):
    config = ShiraConfig(
        r=2,
        target_modules=r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        modules_to_save=["lm_head"],
    )
    model = get_peft_model(t5(), config)
    assert len(model.targeted_module_names) == 8
    assert all("decoder" in name for name in model.targeted_module_names)
    batch = {"input_ids": ids(2, 9), "labels": ids(2, 7)}
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    train(model, batch)
    assert not torch.equal(head, before)
    round_trip(model, t5, batch, tmp_path)


def test_custom_mask_function(tmp_path):
    def first_entries(base_layer, r, **kwargs):
        weight = base_layer.weight
        k = r * sum(weight.shape)
        mask = torch.zeros_like(weight)
        mask.view(-1)[:k] = 1
        return mask

    with pytest.warns(UserWarning, match="my_mask"):
        config = ShiraConfig(r=2, mask_type="my_mask", target_modules=["q_proj"])
    config.mask_fn = first_entries
    model = get_peft_model(opt(), config)
    layer = model.base_model.model.model.decoder.layers[0].self_attn.q_proj
    assert torch.equal(layer.support("default").indices, torch.arange(64, dtype=torch.int32))
    batch = {"input_ids": ids(2, 9), "labels": ids(2, 9)}
    train(model, batch)
    round_trip(model, opt, batch, tmp_path)


def test_gpt2_conv1d(tmp_path):
    config = ShiraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = get_peft_model(gpt2(), config)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (16, 48)
    assert layer.shira_weight["default"].numel() == 2 * (16 + 48)
    batch = {"input_ids": ids(2, 9), "labels": ids(2, 9)}
    train(model, batch)
    round_trip(model, gpt2, batch, tmp_path)
