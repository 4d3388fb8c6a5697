# SPDX-License-Identifier: Apache-2.0
"""Engines that end badly, or that must not be adapted: one each, so these are the slow ones."""

from __future__ import annotations

import pytest
from vllm import LLM

from shira.errors import ServeError
from shira.serve.client import Client
from tests.serve.engine.zoo import ENGINE

pytestmark = pytest.mark.vllm


def test_a_worker_killed_in_the_middle_of_a_switch(zoo, monkeypatch):
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
