# SPDX-License-Identifier: Apache-2.0
"""PEFT models: handed to Switch, or merged and unmerged with the same exactness."""

from __future__ import annotations

import pytest
import torch

from shira import Adapter, ShiraConfig, Switch, get_peft_model
from shira.errors import MergeError, SwitchError

from .models import EVERYTHING, base_weights, everything, llama, randomize, same_weights

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def peft_model():
    config = ShiraConfig(density=0.2, target_modules=TARGETS, random_seed=1)
    model = get_peft_model(llama(), config, adapter_name="a")
    model.add_adapter("b", ShiraConfig(density=0.2, target_modules=TARGETS, random_seed=2))
    randomize(model)
    return model.eval()


def merged_weights(model, names):
    model.base_model.set_adapter(names)
    model.merge_adapter()
    merged = base_weights(model)
    model.unmerge_adapter()
    return merged


def test_a_peft_model_is_the_base_inside(peft_model):
    before = base_weights(peft_model)
    want = {name: merged_weights(peft_model, [name]) for name in "ab"}
    both = merged_weights(peft_model, ["a", "b"])
    for model in (peft_model, peft_model.base_model):
        switch = Switch(model)
        for name in "ab":
            switch.load(name, Adapter.from_model(peft_model, name))
        for name in "abab":
            switch.activate(name)
            assert same_weights(base_weights(peft_model), want[name])
        switch.activate({"a": 1.0, "b": 1.0})
        assert same_weights(base_weights(peft_model), both)
        switch.deactivate()
        assert same_weights(base_weights(peft_model), before)


def test_a_saved_adapter_switches_the_plain_model_to_the_same_answers(peft_model, tmp_path):
    peft_model.save_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    plain = llama()
    switch = Switch(plain)
    with torch.no_grad():
        for name in "ab":
            switch.load(name, tmp_path / name)
            peft_model.set_adapter(name)
            switch.activate(name)
            assert torch.equal(plain(tokens).logits, peft_model(tokens).logits)
    other = llama(seed=3)
    with pytest.raises(ValueError, match="wrong base"):
        Switch(other).load("a", tmp_path / "a")


@pytest.mark.parametrize("when", ["load", "activate"])
def test_a_model_with_merged_adapters_is_refused(peft_model, when):
    adapter = Adapter.from_model(peft_model, "a")
    switch = Switch(peft_model)
    if when == "activate":
        switch.load("x", adapter)
    peft_model.merge_adapter(["a"])
    merged = base_weights(peft_model)
    with pytest.raises(MergeError, match=r"merged adapters \(a\).*unmerge_adapter"):
        switch.load("x", adapter) if when == "load" else switch.activate("x")
    assert same_weights(base_weights(peft_model), merged)
    peft_model.unmerge_adapter()
    if when == "load":
        switch.load("x", adapter)
    switch.activate("x")


def test_merging_while_switched_is_noticed(peft_model):
    before = base_weights(peft_model)
    switch = Switch(peft_model)
    switch.load("x", Adapter.from_model(peft_model, "a"))
    switch.activate("x")
    switched = base_weights(peft_model)
    peft_model.merge_adapter(["a"])
    with pytest.raises(SwitchError, match="written to the weight"):
        switch.deactivate()
    peft_model.unmerge_adapter()
    assert same_weights(base_weights(peft_model), switched)
    switch.deactivate()
    assert same_weights(base_weights(peft_model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_set_adapter_and_merge_adapter_rotate_exactly(dtype):
    model, targets = everything(dtype=dtype), EVERYTHING
    before = base_weights(model)
    where = {n: p.data_ptr() for n, p in model.named_parameters()}
    configs = [
        ShiraConfig(density=0.3, target_modules=targets, random_seed=seed) for seed in range(8)
    ]
    peft = get_peft_model(model, configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        peft.add_adapter(str(number), config)
    randomize(peft)
    generator = torch.Generator().manual_seed(0)
    want = {}
    for _ in range(100):
        names = [str(n) for n in torch.randperm(8, generator=generator)[:2].tolist()]
        peft.base_model.set_adapter(names)
        peft.merge_adapter()
        now = base_weights(peft)
        assert same_weights(now, want.setdefault(tuple(sorted(names)), now))
        peft.unmerge_adapter()
    assert same_weights(base_weights(peft), before)
    here = {n.replace("base_layer.", ""): p.data_ptr() for n, p in model.named_parameters()}
    assert {n: here[n] for n in where} == where
