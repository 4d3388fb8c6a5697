# SPDX-License-Identifier: Apache-2.0
"""Tests inside vLLM, run by ``make test-vllm`` in an environment of its own; elsewhere none."""

from __future__ import annotations

import importlib.util
import os

import pytest

collect_ignore_glob = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:  # vLLM reads its settings when it is imported
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_CI_ENV="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
    )


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    from tests.serve.engine.zoo import make_zoo

    return make_zoo(tmp_path_factory.mktemp("zoo"))
