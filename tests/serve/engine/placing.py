# SPDX-License-Identifier: Apache-2.0
"""vLLM's models without its engine: loaded by its own loader, on one rank or two, and compared."""

from __future__ import annotations

import os

import pytest
import torch

from shira.adapter import Adapter
from shira.checkpoints.models import source_of
from shira.delta import SparseDelta
from shira.errors import PlacementError
from shira.serve.worker import WorkerAdapters
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


def build(folder, ranks: int):
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    options = ENGINE | {"dtype": "bfloat16", "tensor_parallel_size": ranks}
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


def on_two_ranks(rank: int, port: int, cases) -> None:
    initialize(rank, 2, port)
    for base, merged, adapters in cases:
        check(rank, 2, base, merged, adapters)
    leave()
