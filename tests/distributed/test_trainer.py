# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer on two processes against one: what it learns, writes, and resumes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load

from tests.distributed import task
from tests.distributed.launch import launch, needs_deepspeed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TRAINER = ["ddp", "fsdp2", "fsdp2_loads_on_one_rank"]
ACCELERATE = ["accelerate_ddp", "accelerate_fsdp2"]


@pytest.fixture(scope="module")
def alone():
    from tests.distributed import trainer

    return trainer.fit(trainer.InOrderTrainer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer") / "out.pt"
    return launch("trainer", out, *TRAINER, *ACCELERATE)


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


@pytest.mark.parametrize("name", TRAINER)
def test_two_processes(runs, alone, name):
    assert_same(runs[name], alone)


@pytest.mark.parametrize("name", ACCELERATE)
def test_a_loop_written_with_accelerate(runs, name, tmp_path):
    model = task.adapted_llama()
    alone = task.train(model, task.llama_loss)
    model.save_pretrained(tmp_path)
    want = load((tmp_path / "adapter_model.safetensors").read_bytes())
    for found in runs[name]:
        assert not isinstance(found, str), found
        assert found["losses"] == pytest.approx(alone.losses, rel=1e-5)
        for key, values in alone.values.items():
            torch.testing.assert_close(found["values"][key], values, rtol=1e-5, atol=1e-5)
        got = load(found["file"])
        assert {key: value.shape for key, value in got.items()} == {
            key: value.shape for key, value in want.items()
        }
        assert all(torch.equal(got[k], want[k]) for k in want if "shira_indices" in k)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_processes_under_deepspeed(zero_runs, alone, name):
    assert_same(zero_runs[name], alone)
