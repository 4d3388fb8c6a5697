# SPDX-License-Identifier: Apache-2.0
"""An adapter as a worker reads it, without an engine; `tests/serve/engine` has the rest."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from types import MappingProxyType, ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from shira import Adapter, SparseDelta, Support
from shira.checkpoints import open_checkpoint
from shira.errors import PlacementError


@pytest.fixture
def extension(monkeypatch):
    """The worker extension, beside as much of vLLM as its import looks at."""
    for name, fields in {
        "vllm": {},
        "vllm.distributed": {"parallel_state": None},
        "vllm.logger": {"init_logger": lambda name: None},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
    }.items():
        module = ModuleType(name)
        vars(module).update(fields)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "shira.serve.vllm", raising=False)
    module = importlib.import_module("shira.serve.vllm")
    monkeypatch.setattr(module, "_described", lambda adapters, name, loaded: loaded)
    yield module.ShiraWorkerExtension
    del sys.modules["shira.serve.vllm"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_a_tied_embedding(extension, tied, tmp_path):
    save_file(
        {"model.embed_tokens.weight": torch.zeros(8, 4), "model.q.weight": torch.zeros(4, 4)},
        tmp_path / "model.safetensors",
    )
    told = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(told))
    worker = SimpleNamespace(
        _shira_source=open_checkpoint(tmp_path),
        _shira_places={},
        model_config=SimpleNamespace(quantization=None),
    )

    def load(
        name: str, shape: tuple[int, int], metadata=None, more=MappingProxyType({})
    ) -> Adapter:
        delta = SparseDelta(Support(shape, torch.arange(3)), torch.ones(3))
        Adapter({name: delta, **more}, metadata).save(tmp_path / "adapter")
        held = SimpleNamespace(load=lambda name, read, path, compare: read())
        worker._shira_reader = partial(extension._shira_reader, worker)
        worker._shira_unquantized = partial(extension._shira_unquantized, worker)
        return extension._shira_load(worker, held, "a", str(tmp_path / "adapter"), True)

    assert load("model.q.weight", (4, 4)).nnz == 3
    if tied:
        with pytest.raises(PlacementError, match=r"'model.embed_tokens.weight' is tied"):
            load("model.embed_tokens.weight", (8, 4))
    else:
        assert load("model.embed_tokens.weight", (8, 4)).nnz == 3
    if tied:  # trained with the two as one: what the checkpoint has is placed, and both change
        name, shape = "model.embed_tokens.weight", (8, 4)
        told = {"tied_weights": {"lm_head.weight": name}}
        head = SparseDelta(Support(shape, torch.arange(3)), torch.ones(3))
        assert [*load(name, shape, told, {"lm_head.weight": head})] == [name]
        other = {"lm_head.weight": SparseDelta(head.support, torch.zeros(3))}
        with pytest.raises(PlacementError, match="tied"):
            load(name, shape, told, other)
