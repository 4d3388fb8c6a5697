# SPDX-License-Identifier: Apache-2.0
"""Adapters that the first backward pass did not reach are named in a warning, once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .merged import adapted
from .models import llama

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Half(nn.Module):
    """Uses one of its layers; the other's output goes nowhere."""

    def __init__(self, layers=2) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.unused = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        self.unused[0](x)
        return self.head(self.used(x))


def test_layers_that_get_no_gradient_are_named_once(recwarn):
    model = adapted(Half(), ["used", "0", "1"], modules_to_save=["head"])
    model(X)  # a forward alone says nothing
    with torch.no_grad():
        model(X)
    assert not [w for w in recwarn if "gradient" in str(w.message)]
    with pytest.warns(
        UserWarning,
        match=r"'default': no gradient reached 2 .*'unused\.0\.weight', 'unused\.1\.weight'",
    ):
        model(X).sum().backward()
    recwarn.clear()
    model(X).sum().backward()
    assert not [w for w in recwarn if "gradient" in str(w.message)]
    used = model.base_model.model.used
    assert used._gradient_watch is None
    assert not used.shira_weight["default"]._backward_hooks


def test_many_such_layers_are_one_warning():
    model = adapted(Half(30), r"used|unused\.\d+")
    with pytest.warns(UserWarning, match=r"reached 30 of its layers.*and 27 more") as said:
        model(X).sum().backward()
    assert len([w for w in said if "gradient" in str(w.message)]) == 1


def test_no_adapter_got_a_gradient_but_another_part_did():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(F.linear(x, self.fc.weight.detach()))

    model = adapted(Hidden(), ["fc"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match=r"no gradient reached 1 .*fc\.weight"):
        model(X).sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("outside", [[], ["lm_head"]])
def test_all_layers_are_reached_through_checkpoints(outside, use_reentrant, recwarn):
    model = adapted(llama(), ["q_proj", "o_proj", *outside])
    model.train().base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.base_model.model.enable_input_require_grads()
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    assert not [w for w in recwarn if "gradient" in str(w.message) and "adapter" in str(w.message)]


def test_frozen_and_inactive_adapters_are_not_missed(recwarn):
    model = adapted(Half(), ["used", "0"])
    config = type(model.peft_config["default"])(density=0.3, target_modules=["used"], random_seed=1)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "unused" in name:
            parameter.requires_grad_(False)
    model(X).sum().backward()
    assert not [w for w in recwarn if "gradient" in str(w.message)]
