# SPDX-License-Identifier: Apache-2.0
"""Adapters of a mixture's experts, by the names that the model has in memory, in vLLM for CPUs.

They are a row of the table "where LoRA works, does SHiRA?", whose other rows are served on request.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from shira.serve.client import Client
from tests.reach.serving import EXPERTS, FEW, SERVED, adapter_of, ask, cell, model_of

from .zoo import ENGINE, EXTENSION, PROMPTS, TOKENS

pytestmark = pytest.mark.vllm

SHARED = replace(
    SERVED[EXPERTS],
    kind="Qwen2MoeForCausalLM",
    names=(*SERVED[EXPERTS].names, "o_proj.weight", "shared_expert.down_proj.weight"),
    config={key: FEW[key] for key in FEW if key != "head_dim"}
    | {"shared_expert_intermediate_size": 128},
)


def test_served_as_the_merged_model_and_as_the_table_says(tmp_path, forked):
    assert ask(SERVED[EXPERTS], tmp_path) == cell(EXPERTS) == ("yes", "")


@pytest.mark.parametrize("row", [SERVED[EXPERTS], SHARED], ids=lambda row: row.kind)
def test_adapters_of_experts_ride(row, tmp_path, forked):
    """In one batch with the base, whose weights are the same after it."""
    from vllm import LLM, SamplingParams

    base = model_of(row, tmp_path / "base")
    adapter_of(row, base).save(tmp_path / "adapter", format="peft")
    llm = LLM(model=str(base), worker_extension_cls=EXTENSION, **ENGINE, **row.engine)
    greedy = SamplingParams(
        max_tokens=TOKENS, temperature=0, detokenize=False, ignore_eos=True, logprobs=0
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def answers(outputs):
        made = [output.outputs[0] for output in outputs]
        return [
            (
                list(each.token_ids),
                [
                    row[token].logprob
                    for row, token in zip(each.logprobs, each.token_ids, strict=True)
                ],
            )
            for each in made
        ]

    try:
        client = Client(llm, mixing=True)
        before = llm.collective_rpc("compute_weight_checksums")
        client.load("a", str(tmp_path / "adapter"))
        states = [None, {"a": 1.0}, {"a": 0.5}]
        alone = {}
        for i, state in enumerate(states):
            with client.using(state or {}):
                alone[i] = answers(llm.generate(prompts, greedy, use_tqdm=False))
        brought = [state for _ in prompts for state in states]
        mixed = client.generate(
            [prompt for prompt in prompts for _ in states], greedy, adapters=brought, use_tqdm=False
        )
        assert client.mix()["steps"]["riding"] >= TOKENS
        for i, (tokens, scores) in enumerate(answers(mixed)):
            expected = alone[i % 3][i // 3]
            assert tokens == expected[0]
            assert max(abs(x - y) for x, y in zip(scores, expected[1], strict=True)) < 1e-5
        assert llm.collective_rpc("compute_weight_checksums") == before
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert alone[0] != alone[1] != alone[2]
