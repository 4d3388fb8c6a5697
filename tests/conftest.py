# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: no network, one torch thread to a worker, GPU tests only with a GPU."""

from __future__ import annotations

import os

import pytest

# Before anything imports huggingface_hub, which reads them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and without: plain torch."""
    from shira.ops import native

    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "for a test"))
    elif native.load().library is None:
        pytest.skip("needs the compiled kernels")
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    import torch

    # Two workers on two cores: more threads than cores make small matmuls slower, not faster.
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # before anything imports Triton, which reads it once
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # Files that take long first, so that no worker waits for another one at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords have the names of folders too
                item.add_marker(skip)
