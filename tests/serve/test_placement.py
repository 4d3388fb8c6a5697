# SPDX-License-Identifier: Apache-2.0
"""Placement against what the loader really does with a weight of which every entry is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shira.errors import PlacementError
from shira.serve.placement import trace


class Model(nn.Module):
    """Parameters as given, and a loader that a test brings."""

    def __init__(self, loader, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            weight = torch.full(shape, -1.0)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        self.loader = loader

    def load_weights(self, weights):
        loaded = set()
        for name, weight in weights:
            if self.loader(self, name, weight) is not False:
                loaded.add(name)
        return loaded


def entries_at(model, name, shape, dtype=torch.float32):
    """For each storage position that is placed: the flat index of the checkpoint's entry there."""
    total = torch.Size(shape).numel()
    found = {}
    for placement in trace(model, name, shape, dtype):
        entries, positions = placement.box.locate(torch.arange(total))
        assert len(set(positions.tolist())) == positions.numel()
        for entry, position in zip(entries.tolist(), positions.tolist(), strict=True):
            found[placement.storage.weight.data_ptr(), position] = entry
    return found


def check_as_loaded(model, name, shape, placed=None):
    """The traced positions are those at which the loader puts an ``arange``, and it wrote none."""
    before = {key: value.clone() for key, value in model.named_parameters()}
    found = entries_at(model, name, shape)
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]), "tracing wrote to the model"
    total = torch.Size(shape).numel()
    model.load_weights([(name, torch.arange(total, dtype=torch.float32).reshape(shape))])
    loaded = {}
    for parameter in model.parameters():
        flat = parameter.data.reshape(-1)
        for position in (flat >= 0).nonzero().squeeze(1).tolist():
            loaded[parameter.data_ptr(), position] = int(flat[position])
    assert found == loaded
    assert len(found) == (total if placed is None else placed)


def test_a_whole_weight():
    check_as_loaded(Model(lambda m, n, w: m.w.data.copy_(w), w=(5, 7)), "w", (5, 7))


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_of_this_rank_inside_a_fused_weight(rank):
    offsets = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}

    def loader(model, name, weight):
        start, size = offsets[name]
        part = weight.narrow(0, rank * size, size)
        model.qkv.data.narrow(0, start, size).copy_(part)

    check_as_loaded(Model(loader, qkv=(8, 6)), "q", (8, 6), placed=24)
    check_as_loaded(Model(loader, qkv=(8, 6)), "v", (4, 6), placed=12)


def test_one_weight_of_the_checkpoint_that_goes_to_three_places():
    """Phi-3 keeps q, k and v together; each is sharded by itself."""

    def loader(model, name, weight):
        for start, size, into in ((0, 8, 0), (8, 4, 4), (12, 4, 6)):
            half = size // 2
            model.qkv.data[into : into + half].copy_(weight[start + half : start + size])

    check_as_loaded(Model(loader, qkv=(8, 6)), "qkv_proj", (16, 6), placed=48)


def test_columns_of_this_rank():
    def loader(model, name, weight):
        model.down.data.copy_(weight.narrow(1, 4, 4))

    check_as_loaded(Model(loader, down=(6, 4)), "down", (6, 8), placed=24)


def test_a_transposed_weight():
    check_as_loaded(Model(lambda m, n, w: m.w.data.copy_(w.t()), w=(7, 5)), "w", (5, 7))
    check_as_loaded(Model(lambda m, n, w: m.w.data.t().copy_(w), w=(7, 5)), "w", (5, 7))


def test_experts_one_by_one_and_all_at_once():
    def one(model, name, weight):
        expert, part = int(name[0]), name[1:]
        into = model.w13.data[expert]
        into[4 if part == "up" else 0 :][:4].copy_(weight)

    check_as_loaded(Model(one, w13=(3, 8, 6)), "2up", (4, 6))

    def all_at_once(model, name, weight):
        gate, up = weight.transpose(1, 2).chunk(2, dim=1)
        model.w13.data.narrow(1, 0, 4).copy_(gate)
        model.w13.data.narrow(1, 4, 4).copy_(up)

    check_as_loaded(Model(all_at_once, w13=(3, 8, 6)), "experts", (3, 6, 8))


def test_the_vocabulary_of_this_rank_with_padding():
    def loader(model, name, weight):
        part = weight.narrow(0, 6, 5)
        model.embed[: part.shape[0]].data.copy_(part)
        model.embed[part.shape[0] :].data.fill_(-7)

    check_as_loaded(Model(loader, embed=(8, 3)), "embed", (11, 3), placed=15)


def test_a_head_that_is_repeated_goes_to_each_of_its_places():
    def loader(model, name, weight):
        heads = weight.view(2, 1, 2, 3).expand(2, 3, 2, 3)
        model.kv.data.view(2, 3, 2, 3).copy_(heads)

    model = Model(loader, kv=(12, 3))
    check_as_loaded(model, "k", (4, 3), placed=36)


def test_a_part_copied_twice_counts_once():
    def loader(model, name, weight):
        model.w.data.copy_(weight)
        model.w.data.copy_(weight)

    model = Model(loader, w=(2, 3))
    assert len(trace(model, "w", (2, 3), torch.float32)) == 1


def test_tied_weights_are_one_storage():
    model = Model(lambda m, n, w: getattr(m, n).data.copy_(w), embed=(4, 3))
    model.register_parameter("head", model.embed)
    assert entries_at(model, "embed", (4, 3)) == entries_at(model, "head", (4, 3))


def test_a_parameter_that_is_a_view_of_a_larger_storage():
    model = Model(lambda m, n, w: m.w.data.copy_(w), w=(1, 1))
    arena = torch.full((40,), -1.0)
    model.w = nn.Parameter(arena[7:19].view(3, 4), requires_grad=False)
    (placement,) = trace(model, "w", (3, 4), torch.float32)
    _, positions = placement.box.locate(torch.arange(12))
    assert positions.tolist() == list(range(7, 19))
    assert placement.storage.weight.data_ptr() == arena.data_ptr()


def test_a_weight_that_this_rank_has_no_part_of():
    assert trace(Model(lambda m, n, w: False, w=(2, 2)), "w", (2, 2), torch.float32) == ()


def test_moving_and_making_contiguous_are_no_changes():
    def loader(model, name, weight):
        model.w.data.copy_(weight.to("cpu").narrow(1, 0, 2).contiguous())

    assert len(entries_at(Model(loader, w=(3, 2)), "w", (3, 4))) == 6


def replace_parameter(model, name, weight):
    model.w = nn.Parameter(torch.zeros(3, 4), requires_grad=False)


def replace_memory(model, name, weight):
    model.w.data = torch.zeros(3, 4)


REFUSED = {
    "casts": (lambda m, n, w: m.w.data.copy_(w.to(torch.float64)), "casts the weight from"),
    "casts on the way": (lambda m, n, w: m.low.data.copy_(w), "to torch.bfloat16"),
    "derives": (lambda m, n, w: m.w.data.copy_(w * 2), r"derived by aten.mul"),
    "derives by a copy": (lambda m, n, w: m.w.data.copy_(torch.cat([w[:1], w[1:]])), "aten.cat"),
    "quantizes": (
        lambda m, n, w: m.w.data.copy_((w / w.abs().max()).round()),
        "derived by aten.div",
    ),
    "adds": (lambda m, n, w: m.w.data.add_(w), "changes the model by aten.add_"),
    "scatters": (
        lambda m, n, w: m.w.data.index_put_((torch.tensor([0, 1, 2]),), w),
        "changes the model by aten.index_put_",
    ),
    "writes something else": (lambda m, n, w: m.w.data.copy_(torch.ones(3, 4)), "another tensor"),
    "changes the weight": (lambda m, n, w: m.w.data.copy_(w.mul_(2)), "changes the weight by"),
    "replaces the parameter": (replace_parameter, "replaces parameter 'w'"),
    "replaces its memory": (replace_memory, "replaces parameter 'w'"),
    "needs the values": (lambda m, n, w: m.w.data.fill_(w[0, 0].item()), "does not take 'x.w'"),
    "another shape": (lambda m, n, w: m.w.data.copy_(w.view(4, 3)), "does not take 'x.w'"),
    "an unknown name": (lambda m, n, w: m.get_parameter(n), "does not take 'x.w'"),
    "reads overlapping windows": (
        lambda m, n, w: m.w.data.copy_(w.as_strided((3, 4), (1, 1))),
        "overlap",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_loader_that_does_not_place_verbatim_is_refused_by_name(what):
    loader, message = REFUSED[what]
    model = Model(loader, w=(3, 4))
    model.low = nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16), requires_grad=False)
    before, pointer = model.w.clone(), model.w.data_ptr()
    with pytest.raises(PlacementError, match=message) as refused:
        trace(model, "x.w", (3, 4), torch.float32)
    assert "'x.w'" in str(refused.value)
    assert torch.equal(model.w, before)
    assert model.w.data_ptr() == pointer


def test_tracing_makes_nothing_of_the_weights_size():
    """An 8 TB weight: only a tensor without memory can have this shape."""
    shape = (2**20, 2**21)
    model = Model(lambda m, n, w: m.w.data.copy_(w.narrow(0, 9, 1).narrow(1, 5, 4)), w=(1, 4))
    (placement,) = trace(model, "w", shape, torch.float32)
    wanted = 9 * 2**21 + torch.tensor([4, 5, 8, 9])
    entries, positions = placement.box.locate(wanted)
    assert entries.tolist() == [1, 2]
    assert positions.tolist() == [0, 3]
