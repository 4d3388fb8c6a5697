# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer on two processes against one: what it learns, writes, and resumes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load

from tests.distributed.launch import launch, needs_deepspeed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def alone():
    from tests.distributed import trainer

    return trainer.fit(trainer.InOrderTrainer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer") / "out.pt"
    return launch("trainer", out, "ddp", "fsdp2", "fsdp2_loads_on_one_rank")


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory):
    return launch("trainer", tmp_path_factory.mktemp("zero") / "out.pt", "zero2", "zero3")


def assert_same(found, alone):
    for rank in found:
        assert not isinstance(rank, str), rank
        assert rank["whole"] == pytest.approx(alone["whole"], rel=1e-5)
        assert rank["resumed"] == pytest.approx(alone["whole"], rel=1e-5)
        # What has not been trained is the same file, byte for byte; what has, up to rounding.
        assert rank["files"]["unmoved"] == alone["files"]["unmoved"]
        assert json.loads(rank["config"]) == json.loads(alone["config"])
        want = load(alone["files"]["whole"])
        for name in ("whole", "broken"):
            got = load(rank["files"][name])
            assert got.keys() == want.keys()
            for key, tensor in want.items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(got[key], tensor)


def test_alone_it_learns_and_resumes(alone):
    assert alone["whole"][-1] < alone["whole"][0]
    assert alone["resumed"] == alone["whole"]
    assert alone["files"]["broken"] == alone["files"]["whole"] != alone["files"]["unmoved"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_loads_on_one_rank"])
def test_two_processes(runs, alone, name):
    assert_same(runs[name], alone)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_processes_under_deepspeed(zero_runs, alone, name):
    assert_same(zero_runs[name], alone)
