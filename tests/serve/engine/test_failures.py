# SPDX-License-Identifier: Apache-2.0
"""Engines that end badly, or that must not be adapted: one each, so these are the slow ones."""

from __future__ import annotations

import pytest
from vllm import LLM, SamplingParams

from shira.errors import PlacementError, ServeError
from shira.serve.client import Client
from tests.serve.engine.zoo import ENGINE, EXTENSION, PROMPTS

pytestmark = pytest.mark.vllm


def test_a_worker_killed_in_the_middle_of_a_switch(zoo, forked, monkeypatch):
    """The engine is lost with it, as vLLM's always is; the client says so and does not hang."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = LLM(
        model=str(zoo.base),
        worker_extension_cls="tests.serve.engine.deadly.DiesInSwitching",
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **ENGINE,
    )
    before = {file: file.read_bytes() for file in zoo.base.iterdir()}
    try:
        client = Client(llm)
        client.load("a", zoo.path("a"))
        llm.collective_rpc("shira_test_die_next", args=(1,))
        with pytest.raises(ServeError, match="started again"):
            client.activate("a")
        with pytest.raises(ServeError, match="started again"):
            client.deactivate()
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert {file: file.read_bytes() for file in zoo.base.iterdir()} == before


def test_a_quantized_base(zoo, forked):
    options = ENGINE | {"dtype": "bfloat16", "quantization": "fp8_per_channel"}
    llm = LLM(model=str(zoo.base), worker_extension_cls=EXTENSION, **options)
    params = SamplingParams(max_tokens=4, temperature=0, detokenize=False, ignore_eos=True)

    def tokens():
        (out,) = llm.generate({"prompt_token_ids": PROMPTS[0]}, params, use_tqdm=False)
        return list(out.outputs[0].token_ids)

    try:
        client = Client(llm)
        before, weights = tokens(), client.fingerprint()
        with pytest.raises(PlacementError, match="quantization='fp8_per_channel'"):
            client.load("a", zoo.path("a"))
        assert client.list()["adapters"] == {}
        assert (tokens(), client.fingerprint()) == (before, weights)
    finally:
        llm.llm_engine.engine_core.shutdown()
