# SPDX-License-Identifier: Apache-2.0
"""A small UNet of diffusers: convolutions and attention, scales, and the base afterwards."""

from __future__ import annotations

import pytest
import torch

from shira import ShiraConfig, ShiraLayer

from .models import base_weights, randomize, same_weights

diffusers = pytest.importorskip("diffusers")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@pytest.mark.filterwarnings("ignore")
def test_unet():
    model = unet()
    before = base_weights(model)
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 3, 8))
    base = model(*inputs).sample
    model.add_adapter(ShiraConfig(density=0.1, target_modules=["to_q", "to_v", "conv1"]))
    randomize(model)
    kinds = {type(m.get_base_layer()) for m in model.modules() if isinstance(m, ShiraLayer)}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d}
    adapted = model(*inputs).sample
    adapted.square().sum().backward()
    trained = [p for n, p in model.named_parameters() if "shira_weight" in n]
    assert all(p.grad is not None for p in trained)
    model.set_adapters(["default"], [0.5])
    half = model(*inputs).sample
    assert not torch.equal(half, adapted)
    assert not torch.equal(half, base)
    model.disable_adapters()
    assert torch.equal(model(*inputs).sample, base)
    assert same_weights(base_weights(model), before)
