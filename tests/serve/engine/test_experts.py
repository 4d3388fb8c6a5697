# SPDX-License-Identifier: Apache-2.0
"""Adapters of a mixture's experts, by the names that the model has in memory, in vLLM for CPUs."""

from __future__ import annotations

import pytest
import torch
from vllm import LLM, SamplingParams

from shira.adapter import Adapter
from shira.base import fingerprint_fields
from shira.checkpoints import OnDisk, open_checkpoint
from shira.convert import merge
from shira.delta import SparseDelta
from shira.masks import choose
from shira.serve.client import Client
from tests.serve.engine.zoo import ENGINE, EXTENSION, PROMPTS, TOKENS, answers, save_model

pytestmark = pytest.mark.vllm
SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, ignore_eos=True)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A base, an adapter of its experts and of q_proj, and what transformers answers."""
    root = tmp_path_factory.mktemp("mixture")
    base = save_model(root / "base", "Qwen3Moe", **SIZES)
    source = OnDisk(open_checkpoint(base))
    generator, deltas, values = torch.Generator().manual_seed(0), {}, {}
    for name, shape in source.shapes.items():
        experts = ".experts." in name
        if not (experts or name.endswith("q_proj.weight")):
            continue
        count = shape[0] if experts else 1
        k = 2 * sum(shape[-2:]) * count
        support = choose("random", shape, k, seed=1, name=name, matrices=count)
        new = 0.5 * torch.randn(support.nnz, generator=generator)
        deltas[name] = SparseDelta(support, new)
        values[name] = source.entries(name, support.indices.long())
    assert "model.layers.1.mlp.experts.gate_up_proj" in deltas
    adapter = Adapter(deltas, fingerprint_fields(values))
    adapter.save(root / "adapter", format="peft")
    merge(root / "adapter", base, root / "merged")
    return base, root / "adapter", answers(base), answers(root / "merged")


def test_served_with_the_tokens_of_the_merged_model(mixture, forked):
    base, adapter, of_base, of_merged = mixture
    assert [tokens for tokens, _ in of_base] != [tokens for tokens, _ in of_merged]
    llm = LLM(model=str(base), worker_extension_cls=EXTENSION, **ENGINE)
    try:
        client = Client(llm)

        def tokens():
            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            made = llm.generate(prompts, GREEDY, use_tqdm=False)
            return [list(out.outputs[0].token_ids) for out in made]

        before = client.fingerprint()
        said = client.load("a", str(adapter))
        assert said["parameters"] == said["checked"] == 6
        for _ in range(3):
            assert tokens() == [tokens for tokens, _ in of_base]
            client.activate("a")
            assert tokens() == [tokens for tokens, _ in of_merged]
            client.deactivate()
        assert client.fingerprint() == before
    finally:
        llm.llm_engine.engine_core.shutdown()
