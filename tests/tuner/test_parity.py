# SPDX-License-Identifier: Apache-2.0
"""The same losses as PEFT's own SHiRA, step for step."""

from __future__ import annotations

import pytest
import torch

from shira import ShiraConfig, get_peft_model

from .models import llama
from .stock import fixed_mask, stock_model


def losses(model, optimizer_class, steps=20):
    generator = torch.Generator().manual_seed(3)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    result = []
    for _ in range(steps):
        batch = torch.randint(64, (4, 12), generator=generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:mask_type", "ignore:Argument self.mask_type")
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_twenty_steps(optimizer_class):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"r": 2, "target_modules": targets, "mask_type": "fixed"}
    config = ShiraConfig(**options)
    config.mask_fn = fixed_mask
    ours = losses(get_peft_model(llama(), config), optimizer_class)
    theirs = losses(stock_model(llama(), mask_fn=fixed_mask, **options), optimizer_class)
    assert theirs[0] != theirs[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
