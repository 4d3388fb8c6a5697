# SPDX-License-Identifier: Apache-2.0
"""Tests inside vLLM, run by ``make test-vllm`` in an environment of its own; elsewhere none."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os

import pytest

collect_ignore_glob = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:  # vLLM reads its settings when it is imported
    os.environ.update(
        VLLM_CPU_CI_ENV="1",
        VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS="1",
        TORCH_COMPILE_DISABLE="1",  # one small function of the sampler, which takes 15 s
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
    )
    import zmq

    # A context that is collected waits for its sockets: for ever, if an engine has died.
    zmq.Context.__del__ = lambda self: None


@pytest.fixture(scope="session", autouse=True)
def _inspect_models_here():
    """vLLM looks at a model's class in a process of its own, which imports all for that."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield


@pytest.fixture(scope="module")
def forked():
    """Engines fork their processes, as vLLM's do on GPUs: seconds where each imports vLLM anew.

    On a CPU vLLM spawns them, for OpenMP's threads; here is one thread to a process. Tests of
    engines that are spawned: `test_transfer`, `test_server`, and that of `serving.py`.
    """
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    with pytest.MonkeyPatch.context() as patch:
        for module in (utils, multiproc_executor):
            patch.setattr(module, "get_mp_context", lambda: multiprocessing.get_context("fork"))
        yield


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    from tests.serve.engine.zoo import make_zoo

    return make_zoo(tmp_path_factory.mktemp("zoo"))
