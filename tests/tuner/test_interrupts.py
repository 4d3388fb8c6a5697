# SPDX-License-Identifier: Apache-2.0
"""An interrupt, wherever it comes: the base is as it was, and the next forward is right."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from torch import nn

from shira import Adapter, ShiraConfig, SparseDelta, Support, Switch, get_peft_model
from shira.ops import memory
from tests.interrupts import Interrupt, at_every_point

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, ids):
        x = self.linear(self.table(ids))
        return self.conv(x[:, None])


class Scene:
    def __init__(self, dtype=torch.float32, targets=("table", "linear", "conv")):
        torch.manual_seed(0)
        base = Net().to(dtype)
        self.weights = {n: p.detach().clone() for n, p in base.named_parameters()}
        config = ShiraConfig(r=1, target_modules=list(targets), init_weights=False)
        self.model = get_peft_model(base, config)
        self.base = base
        self.ids = torch.arange(8).view(2, 4)
        with torch.no_grad():
            self.expected = self.model(self.ids)
        self.model(self.ids).sum().backward()
        self.gradients = self.take_gradients()

    def parameters(self):
        return {
            name.replace(".base_layer", ""): parameter
            for name, parameter in self.base.named_parameters()
            if "shira_" not in name
        }

    def take_gradients(self):
        taken = [p.grad for n, p in sorted(self.model.named_parameters()) if "shira_" in n]
        self.model.zero_grad(set_to_none=True)
        return taken

    def base_is_untouched(self):
        now = self.parameters()
        return all(torch.equal(now[name], weight) for name, weight in self.weights.items())

    def merged(self):
        return [m.merged for m in self.base.modules() if hasattr(m, "merged_adapters")]

    def next_forward_is_right(self):
        torch.set_grad_enabled(True)  # torch's own contexts do not survive every interrupt
        with torch.no_grad():
            return torch.equal(self.model(self.ids), self.expected)

    def check(self):
        assert self.base_is_untouched()
        assert self.next_forward_is_right()
        assert self.base_is_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(way, dtype):
    scene = Scene(dtype)

    def forward():
        with torch.no_grad():
            scene.model(scene.ids)

    assert at_every_point(forward, scene.check) > 100


def test_backward(way):
    scene = Scene()

    def backward():
        scene.model.zero_grad(set_to_none=True)
        scene.model(scene.ids).sum().backward()

    def check():
        scene.check()
        scene.model.zero_grad(set_to_none=True)
        scene.model(scene.ids).sum().backward()
        for found, wanted in zip(scene.take_gradients(), scene.gradients, strict=True):
            assert torch.equal(found, wanted)

    assert at_every_point(backward, check, every=4) > 200


def test_merge(way):
    scene = Scene()

    def merge():
        scene.model.merge_adapter()

    def check():
        whole = scene.merged()
        assert all(whole) or not any(whole)
        assert scene.next_forward_is_right()
        if any(whole):
            scene.model.unmerge_adapter()
        scene.check()

    assert at_every_point(merge, check, every=5) > 100


def test_unmerge(way):
    scene = Scene()
    scene.model.merge_adapter()

    def unmerge():
        scene.model.unmerge_adapter()

    def check():
        assert scene.next_forward_is_right()
        if any(scene.merged()):
            scene.model.unmerge_adapter()
        scene.check()
        scene.model.merge_adapter()

    assert at_every_point(unmerge, check, every=3) > 100


def test_merge_of_a_second_adapter(way):
    scene = Scene()
    config = ShiraConfig(r=1, target_modules=["linear", "conv"], init_weights=False)
    scene.model.add_adapter("b", config)
    scene.model.merge_adapter(["default"])
    before = {n: p.detach().clone() for n, p in scene.parameters().items()}

    def merge():
        scene.model.merge_adapter(["b"])

    def check():
        layers = [m for m in scene.base.modules() if hasattr(m, "merged_adapters")]
        names = [layer.merged_adapters for layer in layers if "b" in layer.shira_weight]
        assert all(n == names[0] for n in names)
        if names[0] == ["default"]:
            now = scene.parameters()
            assert all(torch.equal(now[name], weight) for name, weight in before.items())
        scene.model.unmerge_adapter()
        assert scene.base_is_untouched()
        assert scene.next_forward_is_right()
        scene.model.merge_adapter(["default"])

    with pytest.warns(UserWarning, match="additionally merging"):
        assert at_every_point(merge, check, every=8) > 100


def test_scale_of_a_merged_adapter(way):
    scene = Scene(targets=("linear",))
    layer = scene.base.linear
    layer.merge()

    def rescale():
        layer.set_scale("default", 2.0)

    def check():
        with torch.no_grad():
            found = scene.model(scene.ids)
            if layer.merged:
                layer.unmerge()
            assert torch.equal(scene.model(scene.ids), found)
        assert scene.base_is_untouched()
        layer.set_scale("default", 1.0)
        layer.merge()

    assert at_every_point(rescale, check, every=9) > 10


def test_merge_and_unload(way):
    scene = Scene()

    def merge_and_unload():
        scene.model.merge_and_unload()

    def check():
        nonlocal scene
        if not scene.merged():  # unloaded, though an interrupt may have come on the way back
            with torch.no_grad():
                assert torch.equal(scene.base(scene.ids), scene.expected)
            scene = Scene()
        assert len(scene.merged()) == 3
        assert not any(scene.merged())
        scene.check()

    assert at_every_point(merge_and_unload, check, every=9) > 300


def test_a_mixed_batch_that_is_interrupted_has_no_effect_on_the_next_forward():
    scene = Scene(targets=("linear",))
    scene.model.eval()

    def mixed():
        with torch.no_grad():
            scene.model(scene.ids, adapter_names=["__base__", "default"])

    assert at_every_point(mixed, scene.check, every=2) > 100


# --- at random times, by a signal -----------------------------------------------------------------


class Busy:
    """A model of 200 x 200 layers, most of whose time is spent with adapters in its weights."""

    def __init__(self, dtype):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200)).to(dtype)
        config = ShiraConfig(r=20, target_modules=["0", "1"], init_weights=False)
        self.model, self.base = get_peft_model(base, config), base
        self.weights = [layer.base_layer.weight for layer in base]
        self.before = [weight.detach().clone() for weight in self.weights]
        self.x = torch.randn(64, 200).to(dtype)
        with torch.no_grad():
            self.expected = self.model(self.x)
        self.other = nn.Linear(200, 200).to(dtype)
        self.other_before = self.other.weight.detach().clone()
        self.switch = Switch(self.other)
        support = Support((200, 200), torch.arange(0, 40_000, 5))
        delta = SparseDelta(support, torch.ones(8_000))
        self.switch.load("one", Adapter({"weight": delta}))

    def forward(self):
        with torch.no_grad():
            self.model(self.x)

    def backward(self):
        self.model(self.x).float().sum().backward()

    def merge_and_unmerge(self):
        self.model.merge_adapter()
        self.model.unmerge_adapter()

    def switch_there_and_back(self):
        self.switch.activate("one")
        self.switch.deactivate()

    def check(self):
        torch.set_grad_enabled(True)  # torch's own contexts do not survive every interrupt
        if any(layer.merged for layer in self.base):
            self.model.unmerge_adapter()
        self.switch.deactivate()
        assert torch.equal(self.other.weight, self.other_before)
        for weight, before in zip(self.weights, self.before, strict=True):
            assert torch.equal(weight, before)
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Already")
def test_at_random_times(way, dtype):
    busy, dice = Busy(dtype), random.Random(0)
    actions = [busy.forward, busy.backward, busy.merge_and_unmerge, busy.switch_there_and_back]
    inside = came = 0

    def handler(*_):
        nonlocal inside, came
        came += 1
        inside += bool(memory.under_way)
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        while came < 100:
            action = dice.choice(actions)
            try:
                # again after a while: one that comes within a finalizer is not seen
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-4, 3e-3), 0.2)
                try:
                    while True:
                        action()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                busy.check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)  # as in `Busy.check`, for the tests that come after
    print(f"{inside} of {came} interrupts came while a weight was being written to or held values")
    assert inside > 20
