# SPDX-License-Identifier: Apache-2.0
"""vLLM's models without its engine: loaded by its own loader, on one rank or two, and compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from shira.adapter import Adapter
from shira.checkpoints import open_checkpoint
from shira.checkpoints.models import source_of
from shira.delta import SparseDelta
from shira.errors import PlacementError
from shira.serve.worker import WorkerAdapters, by_places
from shira.support import Support
from tests.serve.engine.zoo import ENGINE
from tests.workers import leave

WEIGHTS = {"a": 0.7, "b": -0.3}


def initialize(rank: int, ranks: int, port: int) -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_DIST_IDENT"] = str(port)  # as vLLM's CPU worker
    torch.accelerator.empty_cache = torch.accelerator.synchronize = lambda: None  # likewise
    torch.set_num_threads(1)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    import shira.serve.vllm  # noqa: F401  # keeps linear weights plain on CPUs

    # Experts are packed for the CPU's kernels after loading; that is refused, see below. Here the
    # question is where the loader puts them.
    cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = lambda self, layer: None
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        ensure_model_parallel_initialized(ranks, 1)


def build(folder, ranks: int, **changes):
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    options = ENGINE | {"dtype": "bfloat16", "tensor_parallel_size": ranks, **changes}
    config = EngineArgs(model=str(folder), **options).create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def check(rank: int, ranks: int, base, merged, adapters: dict[str, Adapter]) -> None:
    """On this rank: what is active equals the merged checkpoint as vLLM loads it, and back."""
    from shira.serve.vllm import _EngineProcesses, _refuse

    model, expected, original = build(base, ranks), build(merged, ranks), build(base, ranks)
    held = WorkerAdapters(
        model,
        torch.bfloat16,
        _EngineProcesses(rank),
        lambda name, placements: _refuse(model, name, placements),
        source_of(base, [*adapters["a"]]).entries,
    )
    for name, adapter in adapters.items():
        loaded = held.load(name, lambda adapter=adapter: adapter)
        assert loaded.checked == len(adapter)
        assert 0 < loaded.nnz_here <= adapter.nnz
        assert ranks == 1 or loaded.nnz_here < adapter.nnz
    held.activate(WEIGHTS)
    same(model, expected)
    held.activate({})
    same(model, original)
    if "lm_head.weight" not in source_of(base).shapes:
        refuses_what_is_tied(held, model)


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def refuses_what_is_tied(held: WorkerAdapters, model: torch.nn.Module) -> None:
    delta = SparseDelta(Support((250, 128), torch.arange(9)), torch.ones(9))
    with pytest.raises(PlacementError, match="tied"):  # the loader itself says what it is tied to
        held.load("head", lambda: Adapter({"lm_head.weight": delta}))


def check_joined(rank: int, case: Joined) -> None:
    """Adapters by the names of joined experts: each rank has its part of the merged weights.

    The parts are cut here by plain slices, and are those that vLLM loads of the merged checkpoint.
    """
    from shira.serve.vllm import _EngineProcesses, _refuse

    options = {"enable_expert_parallel": case.whole_experts}
    model, expected = build(case.base, 2, **options), build(case.merged, 2, **options)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    held = WorkerAdapters(
        model,
        torch.bfloat16,
        _EngineProcesses(rank),
        lambda name, placements: _refuse(model, name, placements),
        **by_places(open_checkpoint(case.base).places.by_name),
    )
    loaded = held.load("a", lambda: case.adapter)
    assert loaded.checked == len(case.adapter)
    assert 0 < loaded.nnz_here < case.adapter.nnz
    held.activate({"a": 1.0})
    same(model, expected)
    parameters = dict(model.named_parameters())
    for layer in range(2):
        gate_up = case.inside[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = case.inside[f"model.layers.{layer}.mlp.experts.down_proj"]
        (w13,) = (w for n, w in parameters.items() if f"s.{layer}." in n and "w13_weight" in n)
        (w2,) = (w for n, w in parameters.items() if f"s.{layer}." in n and "w2_weight" in n)
        if case.whole_experts:
            half = len(gate_up) // 2
            here = slice(rank * half, rank * half + half)
            assert torch.equal(w13, gate_up[here])
            assert torch.equal(w2, down[here])
            continue
        half = down.shape[2] // 2
        here = slice(rank * half, rank * half + half)
        gate, up = gate_up.split(down.shape[2], dim=1)
        rows = w13.shape[1] // 2  # vLLM fills each half up to a multiple of 32
        assert torch.equal(w13[:, :half], gate[:, here])
        assert torch.equal(w13[:, rows : rows + half], up[:, here])
        assert torch.equal(w2[:, :, :half], down[:, :, here])
    held.activate({})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


class Joined(NamedTuple):
    """A base, an adapter of its joined experts, what it makes of them, and how they are spread."""

    base: Path
    merged: Path
    adapter: Adapter
    inside: dict[str, torch.Tensor]
    whole_experts: bool


def on_two_ranks(rank: int, port: int, cases, joined: list[Joined]) -> None:
    initialize(rank, 2, port)
    for base, merged, adapters in cases:
        check(rank, 2, base, merged, adapters)
    for case in joined:
        check_joined(rank, case)
    leave()
