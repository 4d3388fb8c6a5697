# SPDX-License-Identifier: Apache-2.0
"""Writes that are interrupted, nested, forked or made by several threads at once."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
import torch
from torch import nn

from shira import ShiraConfig, get_peft_model, ops
from shira.errors import SwitchError
from shira.ops import memory, native
from shira.ops.memory import MemoryMap, SharedMemoryError
from shira.support import Support
from tests.interrupts import Interrupt, in_child


class Weight:
    """A weight with one adapter."""

    def __init__(self, data):
        self.weight = nn.Parameter(data, requires_grad=False)
        self.before = data.clone()
        flat = torch.arange(0, data.numel(), 3)
        self.indices = Support(tuple(data.shape), flat).coordinates()
        self.delta = torch.ones(flat.numel())
        self.merged = data.clone()
        self.merged.view(-1)[flat] += 1.0

    def product(self):
        return ops.linear(torch.eye(4), self.weight, None, [self.delta], [self.indices])

    def is_right(self):
        return torch.equal(self.product(), self.merged.t()) and torch.equal(
            self.weight, self.before
        )


@pytest.fixture
def held(way):
    return Weight(torch.arange(16.0).view(4, 4))


def writes():
    kernels = native.load().library
    return ops.resident.__globals__["TorchWrite"] if kernels is None else native.DeltaWrite


def interrupt_twice(monkeypatch, held):
    """Interrupt a product, and the exception path that puts the originals back."""

    def interrupted(*_):
        raise Interrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", interrupted)
        patched.setattr(writes(), "put_back", interrupted)
        with pytest.raises(Interrupt):
            held.product()


def test_what_two_interrupts_left_is_undone_by_the_next_write(held, monkeypatch):
    interrupt_twice(monkeypatch, held)
    assert torch.equal(held.weight, held.merged)
    assert held.is_right()
    assert not memory.under_way


def test_what_two_interrupts_left_is_undone_by_the_next_reader(held, monkeypatch):
    interrupt_twice(monkeypatch, held)
    memory.settle(held.weight)
    assert torch.equal(held.weight, held.before)
    assert not memory.under_way


def test_no_lock_stays_held(held, monkeypatch):
    interrupt_twice(monkeypatch, held)
    right = []
    thread = threading.Thread(target=lambda: right.append(held.is_right()))
    thread.start()
    thread.join(20)
    assert right == [True]


def test_a_signal_handler_that_uses_the_weight_it_interrupts_is_refused(held, monkeypatch):
    real, refused = torch.nn.functional.linear, []

    def handler(*_):
        for use in (held.product, lambda: memory.settle(held.weight)):
            with pytest.raises(SwitchError, match="in the middle of a product"):
                use()
            refused.append(use)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*args)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "linear", interrupted)
            result = held.product()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(refused) == 2
    assert torch.equal(result, held.merged.t())
    assert held.is_right()


def test_a_fork_within_a_product_keeps_it_in_the_parent_and_in_the_child(held, monkeypatch):
    real, children = torch.nn.functional.linear, []

    def forks(*args):
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(20)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", forks)
        result = held.product()
    right = torch.equal(result, held.merged.t()) and held.is_right()
    if not children[-1]:
        os._exit(0 if right else 3)
    assert os.waitpid(children[-1], 0)[1] == 0
    assert right


@pytest.mark.slow
def test_children_forked_during_forwards_have_the_base_and_free_locks():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256))
    before = base[0].weight.detach().clone()
    config = ShiraConfig(r=20, target_modules=["0"], init_weights=False)
    model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    weight, x = layer.base_layer.weight, torch.randn(512, 256)
    with torch.no_grad():
        expected = model(x[:1])
    stop = threading.Event()

    def work():
        with torch.no_grad():
            while not stop.is_set():
                model(x)

    def child():
        with torch.no_grad():
            pristine = torch.equal(weight, before)
            return pristine and torch.equal(model(x[:1]), expected)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        inside = forks = 0
        while inside < 20:  # asked for within a product
            forks += 1
            assert forks < 500, inside
            inside += bool(memory.under_way)
            assert in_child(child)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(weight, before)


def test_threads_that_fork_at_once_leave_every_lock_free():
    def fork():
        for _ in range(5):
            assert in_child(lambda: True)
        finished.append(True)

    finished = []
    forking = [threading.Thread(target=fork) for _ in range(3)]
    for thread in forking:
        thread.start()
    for thread in forking:
        thread.join(60)
    assert len(finished) == 3
    free = [lock.acquire(timeout=5) for lock in memory._LOCKS]
    assert all(free)
    for lock in memory._LOCKS:
        lock.release()


# --- memory that others see -----------------------------------------------------------------------


def mapped(path, mode):
    numpy = pytest.importorskip("numpy")
    torch.arange(16.0).numpy().tofile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: not writable
        return torch.from_numpy(numpy.memmap(path, numpy.float32, mode)).view(4, 4)


@pytest.mark.parametrize("kind", ["shared", "read-only", "written through"])
def test_a_weight_put_into_other_memory_later_is_moved_once(way, kind, tmp_path):
    held = Weight(torch.arange(16.0).view(4, 4))
    assert held.is_right()
    if kind == "shared":
        held.weight.share_memory_()
    else:
        held.weight.data = mapped(tmp_path / "w", "r" if kind == "read-only" else "r+")
    outside = held.weight.data
    with pytest.warns(UserWarning, match="memory of its own now"):
        assert held.is_right()
    own = held.weight.data_ptr()
    assert own != outside.data_ptr()
    assert torch.equal(outside, held.before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held.is_right()
    assert held.weight.data_ptr() == own


def test_other_processes_never_see_an_adapter(way):
    held = Weight(torch.arange(16.0).view(4, 4))
    held.weight.share_memory_()
    outside, seen = held.weight.data, []
    real = torch.nn.functional.linear

    def look(*args):
        seen.append(outside.clone())
        return real(*args)

    torch.nn.functional.linear = look
    try:
        with pytest.warns(UserWarning, match="memory of its own now"):
            held.product()
    finally:
        torch.nn.functional.linear = real
    assert torch.equal(seen[0], held.before)


def test_a_tensor_that_is_no_parameter_is_left_where_it_is(way):
    held = Weight(torch.arange(16.0).view(4, 4))
    shared = held.weight.data.clone().share_memory_()
    held.weight = shared
    assert held.is_right()
    assert held.weight is shared
    with pytest.raises(SharedMemoryError, match="put a copy in its place"):
        memory.write_to(shared, None, lambda _: None)


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_memory_that_torch_did_not_allocate_is_looked_up_once(tmp_path, monkeypatch, mode):
    tensor = mapped(tmp_path / "w", mode)
    assert MemoryMap().is_private(tensor) == (mode == "c")
    again = property(lambda self: pytest.fail("read again"))
    monkeypatch.setattr(MemoryMap, "_mappings", again)
    if mode == "c":
        assert MemoryMap().is_private(tensor)
    assert MemoryMap().is_private(torch.zeros(3))


def test_places_in_memory():
    flat = torch.arange(24, dtype=torch.int32)
    weight = torch.arange(24).view(2, 3, 4)
    assert memory.offsets_of(flat, weight.shape, weight.stride()) is flat
    turned = weight.permute(2, 0, 1)
    offsets = memory.offsets_of(flat, turned.shape, turned.stride())
    assert torch.equal(offsets, turned.reshape(-1))
    for offset in range(24):
        assert turned[memory.index_of(turned, offset)] == offset
