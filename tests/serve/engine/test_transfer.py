# SPDX-License-Identifier: Apache-2.0
"""Updates of an adapter as k values through vLLM's weight transfer, and vLLM's sparse patches."""

from __future__ import annotations

import pytest
import torch
from vllm import LLM, SamplingParams

from benchmarks.vllm_server import free_port
from shira.adapter import Adapter
from shira.convert import save_patches, to_patches
from shira.delta import SparseDelta
from shira.errors import AdapterError, ServeError
from shira.serve.client import Client
from shira.serve.value_sender import LLMClient, ValueSender
from tests.serve.engine.zoo import ENGINE, EXTENSION, PROMPTS

pytestmark = pytest.mark.vllm
GREEDY = SamplingParams(max_tokens=4, temperature=0, detokenize=False, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(zoo):
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # the tests send functions to workers
    llm = LLM(
        model=str(zoo.base),
        worker_extension_cls=EXTENSION,
        weight_transfer_config={"backend": "shira"},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **ENGINE,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    patch.undo()


def with_values(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: SparseDelta(delta.support, 0.5 * torch.randn(delta.nnz, generator=generator))
            for name, delta in adapter.items()
        },
        adapter.metadata,
    )


def checksums(llm):
    return llm.collective_rpc("compute_weight_checksums")


def tokens(llm):
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [0] * len(prompts), "old blocks were used"
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_updates_are_those_of_an_adapter_loaded_from_a_file(llm, zoo, tmp_path):
    client, base = Client(llm), checksums(llm)
    client.load("policy", zoo.path("a"))
    client.activate("policy")
    sender = ValueSender(
        LLMClient(llm),
        zoo.adapters["a"],
        name="policy",
        path=zoo.path("a"),
        port=free_port(),
        workers=2,
    )
    for step in range(2):
        new = with_values(zoo.adapters["a"], step)
        assert sender.send(new) == 4 * new.nnz
        updated, answered = checksums(llm), tokens(llm)
        new.save(tmp_path / str(step), format="peft")
        client.load(f"file{step}", tmp_path / str(step))
        client.activate(f"file{step}")
        assert checksums(llm) == updated
        assert tokens(llm) == answered
        client.activate("policy")
        assert checksums(llm) == updated
        llm.reset_prefix_cache()

    broken = with_values(zoo.adapters["a"], 5)
    broken["lm_head.weight"].values[0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        sender.send(broken)
    with pytest.raises(AdapterError, match="positions"):
        sender.send(zoo.adapters["b"])
    assert checksums(llm) == updated
    llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], GREEDY, use_tqdm=False)
    with pytest.raises(ServeError, match="unfinished"):
        sender.send(new)
    llm.wait_for_completion(use_tqdm=False)
    assert checksums(llm) == updated
    client.deactivate()
    assert checksums(llm) == base


def apply_patches(worker, path):
    """vLLM's own way to apply sparse patches in checkpoint coordinates, from a file of ours."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    from shira.convert import load_patches

    with set_current_vllm_config(worker.vllm_config):
        load_checkpoint_weight_patches(
            worker.get_model(),
            [
                CheckpointWeightPatch(
                    name=patch.name,
                    shape=patch.full_shape,
                    dtype=patch.values.dtype,
                    values=patch.values,
                    indices=patch.indices,
                )
                for patch in load_patches(path)
            ],
        )


def test_exported_patches_applied_by_vllm_are_the_adapter(llm, zoo, tmp_path):
    client, base = Client(llm), checksums(llm)
    client.load("b", zoo.path("b"))
    client.activate("b")
    ours = checksums(llm)
    client.deactivate()
    save_patches(to_patches(zoo.adapters["b"], zoo.base), tmp_path / "patches")
    llm.collective_rpc(apply_patches, args=(str(tmp_path / "patches"),))
    assert checksums(llm) == ours
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(zoo.base)})
    assert checksums(llm) == base
