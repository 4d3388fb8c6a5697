# SPDX-License-Identifier: Apache-2.0
"""A file that is refused leaves the model as it was (tests/tuner/test_loading.py: PEFT's way)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from shira import Adapter, SparseDelta, Support, Switch
from shira.errors import ShiraError
from tests.hostile import compact_files, peft_files


class Weight(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class Net(nn.Module):
    """Has the weights of the sound files, in both formats."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        for name, shape in compact_files.SHAPES.items():
            self.add_module(name.removesuffix(".weight"), Weight(shape))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = copy.deepcopy(model.state_dict())
    at = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    yield
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: weight.data_ptr() for name, weight in after.items()} == at
    assert [(name, type(module)) for name, module in model.named_modules()] == modules


@pytest.mark.parametrize("active", [False, True])
def test_switch(active: bool, tmp_path: Path) -> None:
    """All kinds, on a model with and without an adapter in its weights."""
    torch.manual_seed(0)
    net = Net()
    original = copy.deepcopy(net.state_dict())
    switch = Switch(net)
    support = Support((8, 6), torch.tensor([1, 7]))
    switch.load("good", Adapter({"layer.weight": SparseDelta(support, torch.ones(2))}))
    if active:
        switch.activate("good")
    paths = []
    for peft in peft_files.HOSTILE:
        if not peft.name.startswith("shapes_lack"):  # which another kind of config makes sound
            folder = peft_files.write_sound(tmp_path / peft.name)
            peft.spoil(folder)
            paths.append(folder)
    for compact in compact_files.HOSTILE:
        path = tmp_path / f"{compact.name}.safetensors"
        path.write_bytes(compact.spoil())
        paths.append(path)
    with untouched(net):
        for path in paths:
            with pytest.raises(ShiraError) as caught:
                switch.load("bad", path)
            assert str(path) in str(caught.value)
    assert not active or not torch.equal(net.layer.weight, original["layer.weight"])
    switch.deactivate()
    assert all(torch.equal(net.state_dict()[name], original[name]) for name in original)
