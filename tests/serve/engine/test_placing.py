# SPDX-License-Identifier: Apache-2.0
"""Layouts: what our placement changes is what vLLM's loader makes of a merged checkpoint."""

from __future__ import annotations

import math
import socket
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from shira.adapter import Adapter
from shira.checkpoints import open_checkpoint
from shira.checkpoints.entries import read_entries
from shira.checkpoints.models import source_of
from shira.convert import merge
from shira.delta import SparseDelta
from shira.errors import PlacementError
from shira.serve.export import to_vllm_patches
from shira.serve.placement import trace
from shira.serve.worker import WorkerAdapters, by_places
from shira.support import Support
from tests.serve.engine import placing
from tests.serve.engine.zoo import make_adapter, merged, save_merged, save_model, weights_of

pytestmark = pytest.mark.vllm

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
}
# Llama's q, k, v, gate and up are Qwen2's without biases, and its head of its own is Phi3's.
KINDS = {
    "Qwen2": {"tie_word_embeddings": True},
    "Phi3": {},
    "Qwen2Moe": MOE,
}
JOINED = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32},
    "Mixtral": {"num_local_experts": 4, "head_dim": 32, "intermediate_size": 48},
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    made = {}
    for kind, changes in KINDS.items():
        base = save_model(root / kind, kind, dtype=torch.bfloat16, **changes)
        weights = weights_of(base)
        adapters = {name: make_adapter(weights, seed) for seed, name in enumerate("ab")}
        terms = [(adapters[name], scale) for name, scale in placing.WEIGHTS.items()]
        inside = merged(weights, *terms)
        made[kind] = (base, save_merged(root / f"{kind}-merged", base, inside), adapters)
    assert any("qkv_proj" in name for name in made["Phi3"][2]["a"])
    assert not any("lm_head" in name for name in made["Qwen2"][2]["a"])
    assert any("experts" in name for name in made["Qwen2Moe"][2]["a"])
    return made


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    root = tmp_path_factory.mktemp("joined")
    made = []
    for kind, changes in JOINED.items():
        base = save_model(root / kind, kind, dtype=torch.bfloat16, **changes)
        weights = as_the_module_has(base)
        adapter = make_adapter(weights, 3)
        merge(adapter, base, root / f"{kind}-merged")
        inside = merged(weights, (adapter, 1.0))
        made += [
            placing.Joined(base, root / f"{kind}-merged", adapter, inside, whole_experts)
            for whole_experts in ((False, True) if kind == "Qwen3Moe" else (False,))
        ]
    return made


def as_the_module_has(base):
    """A checkpoint's weights by the names and in the shapes of the module's parameters."""
    return {
        name: read_entries(place, torch.arange(math.prod(place.shape))).view(place.shape)
        for name, place in open_checkpoint(base).places.by_name.items()
    }


def test_on_two_ranks(cases, joined):
    """Before this process becomes a rank itself: it is forked."""
    arguments = (free_port(), list(cases.values()), joined)
    torch.multiprocessing.start_processes(
        placing.on_two_ranks, arguments, nprocs=2, start_method="fork"
    )


@pytest.fixture(scope="module")
def alone():
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    placing.initialize(0, 1, free_port())
    yield
    # The workers of engines are forked from this process, and begin with what it has.
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.mark.parametrize("kind", KINDS)
def test_on_one_rank(kind, cases, alone):
    placing.check(0, 1, *cases[kind])


def test_patches_in_vllms_own_form(cases, alone):
    from vllm.distributed.weight_transfer.sparse_nccl_engine import (
        SparseNCCLTrainerWeightTransferEngine,
    )
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    base, _, adapters = cases["Phi3"]
    model, expected = placing.build(base, 1), placing.build(base, 1)
    patches = to_vllm_patches(adapters["a"], base, scale=0.5)
    assert {patch.name for patch in patches} == set(adapters["a"])
    for patch in patches:
        SparseNCCLTrainerWeightTransferEngine._validate_patch(patch)
    load_checkpoint_weight_patches(
        model,
        [
            CheckpointWeightPatch(p.name, p.full_shape, p.values.dtype, p.values, p.indices)
            for p in patches
        ],
    )
    held = WorkerAdapters(expected, torch.bfloat16)
    held.load("a", lambda: adapters["a"])
    held.activate({"a": 0.5})
    placing.same(model, expected)


def test_weights_that_vllm_does_not_compute_with():
    """There, as the loader says, but packed on this CPU or absorbed into other matrices."""
    from shira.serve.vllm import _refuse

    model = torch.nn.Module()
    model.packed, model.plain, model.kv = (torch.nn.Linear(4, 4) for _ in range(3))
    model.packed.cpu_linear = lambda x, weight, bias: x
    model.plain.cpu_linear = torch.nn.functional.linear
    model.mla = torch.nn.Module()
    model.mla.kv_b_proj, model.mla.W_UV = model.kv, torch.zeros(2)
    model.load_weights = lambda weights: [
        model.get_parameter(name).data.copy_(weight) for name, weight in weights
    ]
    for name, message in [("packed", "packed copy"), ("kv", "derived from"), ("plain", None)]:
        placements = trace(model, f"{name}.weight", (4, 4), torch.float32)
        if message is None:
            _refuse(model, name, placements)
            continue
        with pytest.raises(PlacementError, match=message):
            _refuse(model, name, placements)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_eplb": True}, "moves the experts of 'w1.weight'"),
        ({"dp_size": 2}, "more processes .*data_parallel_size=2"),
        ({"pcp_size": 2}, "more processes .*prefill_context_parallel_size=2"),
        ({"tp_size": 2}, None),
        ({"use_ep": True, "ep_size": 2}, None),
    ],
)
def test_experts_that_move_or_are_with_other_engines_are_refused(changes, message):
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    from shira.serve.vllm import _refuse

    model = torch.nn.Module()
    model.experts, model.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    parallel = replace(FusedMoEParallelConfig.make_no_parallel(), **changes)
    model.experts.moe_config = SimpleNamespace(moe_parallel_config=parallel)
    model.load_weights = lambda weights: [
        getattr(model, {"w1.weight": "experts"}.get(name, "other")).weight.data.copy_(weight)
        for name, weight in weights
    ]
    _refuse(model, "q.weight", trace(model, "q.weight", (4, 4), torch.float32))
    placements = trace(model, "w1.weight", (4, 4), torch.float32)
    with nullcontext() if message is None else pytest.raises(PlacementError, match=message):
        _refuse(model, "w1.weight", placements)


def test_experts_that_are_packed_after_loading_are_refused(cases, alone):
    """In the same memory, of the same shape and dtype: the values alone can tell."""
    base, _, adapters = cases["Qwen2Moe"]
    model = placing.build(base, 1)
    (experts,) = {
        name for name, _ in model.named_parameters() if "layers.0" in name and "w2" in name
    }
    weight = model.get_parameter(experts)
    weight.data.copy_(weight.data.reshape(4, -1, 2).transpose(1, 2).reshape(weight.shape))
    name = next(
        n for n in adapters["a"] if "layers.0" in n and "down_proj" in n and "experts.1" in n
    )
    held = WorkerAdapters(model, torch.bfloat16, stored=source_of(base, [name]).entries)
    delta: SparseDelta = adapters["a"][name]
    with pytest.raises(PlacementError, match="packed or shuffled"):
        held.load("a", lambda: Adapter({name: delta}))


@pytest.mark.parametrize(
    ("kind", "changes", "mapped"),
    [
        ("Qwen2Moe", MOE, "mlp.experts.gate_up_proj"),
        ("Mixtral", {"num_local_experts": 4, "head_dim": 32}, "mlp.experts.down_proj"),
        ("GPTNeoX", {}, "lm_head.weight"),
    ],
)
def test_adapters_by_the_names_of_the_module(kind, changes, mapped, tmp_path, alone):
    """Other names, and other pieces, than the checkpoint's, from which vLLM loads."""
    base = save_model(tmp_path / "base", kind, dtype=torch.bfloat16, **changes)
    places = open_checkpoint(base).places.by_name
    assert any(name.endswith(mapped) for name in places)
    assert not any(name.endswith(mapped) for name in weights_of(base))
    adapter = make_adapter(as_the_module_has(base), 3)
    merge(adapter, base, tmp_path / "merged")
    model, expected = placing.build(base, 1), placing.build(tmp_path / "merged", 1)
    original = placing.build(base, 1)
    held = WorkerAdapters(model, torch.bfloat16, **by_places(places))
    loaded = held.load("a", lambda: adapter)
    assert loaded.checked == len(adapter)
    held.activate({"a": 1.0})
    placing.same(model, expected)
    held.activate({})
    placing.same(model, original)


def test_a_packed_copy_is_computed_with_while_the_weight_holds_the_base(monkeypatch):
    from shira.serve import vllm_cpu

    torch.manual_seed(0)
    monkeypatch.setattr(vllm_cpu, "_packing", True)
    model = torch.nn.Module()
    model.requires_grad_(False)
    model.layer = layer = torch.nn.Linear(64, 96).requires_grad_(False)
    model.load_weights = lambda weights: [
        model.get_parameter(name).data.copy_(weight) for name, weight in weights
    ]
    vllm_cpu._dispatch(layer, True)
    x, before = torch.randn(16, 64), layer.weight.clone()

    def product():
        """What is computed, and whether with the packed copy."""
        called = []
        packed = layer.cpu_linear.product
        with monkeypatch.context() as patch:
            patch.setattr(layer.cpu_linear, "product", lambda *a: called.append(1) or packed(*a))
            return layer.cpu_linear(x, layer.weight, layer.bias), bool(called)

    def is_of_the_weight(got):
        return torch.allclose(got, torch.nn.functional.linear(x, layer.weight, layer.bias), 1e-4)

    base, packed = product()
    assert packed
    assert is_of_the_weight(base)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        assert not product()[1]
    held = WorkerAdapters(model, torch.float32, writing=vllm_cpu.writing)
    support = Support.from_unsorted((96, 64), torch.arange(0, 6000, 50))
    delta = SparseDelta(support, torch.randn(support.nnz))
    held.load("a", lambda: Adapter({"layer.weight": delta}))
    for _ in range(2):
        held.activate("a")
        got, packed = product()
        assert not packed
        assert is_of_the_weight(got)
        assert not torch.allclose(got, base, 1e-4)
        held.activate({})
        assert torch.equal(layer.weight, before)
        got, packed = product()
        assert packed
        assert torch.equal(got, base)
    with monkeypatch.context() as patch:  # a write that fails
        patch.setattr(held._weights, "exchange", mock.Mock(side_effect=OSError("no")))
        with pytest.raises(OSError, match="no"):
            held.activate("a")
    assert product()[1]
    layer.weight.copy_(before * 2)  # by somebody else
    got, packed = product()
    assert not packed
    assert is_of_the_weight(got)
    vllm_cpu.pack_again(model)
    got, packed = product()
    assert packed
    assert is_of_the_weight(got)
    held.rebase(check=False)
    assert product()[1]
    assert not vllm_cpu.packs_apart(layer)
