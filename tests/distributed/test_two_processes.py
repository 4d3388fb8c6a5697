# SPDX-License-Identifier: Apache-2.0
"""DDP, FSDP2 and DeepSpeed on two gloo processes against one process."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from shira import Adapter
from tests.distributed import task
from tests.distributed.launch import launch, needs_deepspeed
from tests.tuner.experts import mixture, tokens

TOLERANCE = 1e-5

pytestmark = pytest.mark.slow

LLAMA = [
    *("ddp", "ddp_accumulates", "ddp_compiled", "only_one_rank_has_a_second_model"),
    *("fsdp2", "fsdp2_keeps_whole", "fsdp2_checkpoints", "fsdp2_accumulates", "fsdp2_compiled"),
]
TIED = ["ddp_tied", "fsdp2_tied"]
EVERYTHING = ["ddp_all_layer_types", "fsdp2_each_layer_alone"]
ZERO_LLAMA = [
    *("zero2", "zero3", "zero3_accumulates", "zero3_checkpoints"),
    *("zero2_offloads", "zero3_offloads"),
]
ZERO_EVERYTHING = ["zero3_all_layer_types"]


@pytest.fixture(scope="module")
def torch_runs(tmp_path_factory):
    return launch("worker", tmp_path_factory.mktemp("torch") / "out.pt")


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory):
    return launch("zero", tmp_path_factory.mktemp("zero") / "out.pt")


@pytest.fixture(scope="module")
def llama_alone():
    return task.train(task.adapted_llama(), task.llama_loss)


@pytest.fixture(scope="module")
def everything_alone():
    return task.train(task.adapted_everything(), task.everything_loss)


@pytest.fixture(scope="module")
def file_alone(tmp_path_factory):
    return task.save(task.adapted_llama(), tmp_path_factory.mktemp("alone"))


def results(runs, name):
    """Of both ranks; a rank that failed shows its error."""
    assert not [found for found in runs[name] if isinstance(found, str)], runs[name][0]
    return [found["result"] if isinstance(found, dict) else found for found in runs[name]]


def assert_same(result, alone, tolerance=TOLERANCE):
    assert result.base_intact
    assert result.losses == pytest.approx(alone.losses, rel=tolerance)
    assert len(alone.grads) == len(result.grads) == task.STEPS
    for got, want in zip(result.grads, alone.grads, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype
            difference = (got[name] - want[name]).abs().max()
            assert difference <= tolerance * want[name].abs().max(), name
    for name, values in alone.values.items():
        torch.testing.assert_close(result.values[name], values, rtol=tolerance, atol=tolerance)


def test_the_run_alone_trains(llama_alone):
    """What the others are compared with does something."""
    assert llama_alone.base_intact
    assert len(llama_alone.values) == 14
    assert all(grad.abs().max() > 0 for grad in llama_alone.grads[0].values())
    first = task.values_of(task.adapted_llama())
    assert all(not torch.equal(first[name], v) for name, v in llama_alone.values.items())
    assert any(values.numel() % 2 for values in first.values())


@pytest.mark.parametrize("name", LLAMA)
def test_a_language_model(torch_runs, llama_alone, name):
    for result in results(torch_runs, name):
        assert_same(result, llama_alone)


@pytest.fixture(scope="module")
def tied_alone():
    return task.train(task.adapted_tied_llama(), task.llama_loss)


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_that_are_adapted_once(torch_runs, tied_alone, name):
    for result in results(torch_runs, name):
        assert_same(result, tied_alone)


@needs_deepspeed
def test_tied_weights_under_zero3(zero_runs, tied_alone):
    for result in results(zero_runs, "zero3_tied"):
        assert_same(result, tied_alone)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_layer_type(torch_runs, everything_alone, name):
    for result in results(torch_runs, name):
        assert_same(result, everything_alone)


@pytest.fixture(scope="module")
def mixture_alone():
    model = task.adapted_mixture()
    return model, task.train(model, task.mixture_loss)


@pytest.mark.parametrize("name", ["ddp_experts", "fsdp2_experts", "fsdp2_experts_alone"])
def test_experts_of_a_mixture(torch_runs, mixture_alone, name):
    for result in results(torch_runs, name):
        assert_same(result, mixture_alone[1])


@needs_deepspeed
def test_experts_of_a_mixture_under_zero3(zero_runs, mixture_alone):
    for result in results(zero_runs, "zero3_experts"):
        assert_same(result, mixture_alone[1])
    assert [found["left"] for found in zero_runs["zero3_experts"]] == [[], []]


@pytest.mark.parametrize("runs", ["torch_runs", pytest.param("zero_runs", marks=needs_deepspeed)])
def test_adapted_experts_are_saved_loaded_and_merged(request, mixture_alone, runs, tmp_path):
    """In a model in one process: the file of before training, and what was trained."""
    name = {"torch_runs": "fsdp2_experts", "zero_runs": "zero3_experts"}[runs]
    first = task.save(task.adapted_mixture(), tmp_path)
    for found in request.getfixturevalue(runs)[name]:
        assert found["file"] == first
        (tmp_path / "adapter_model.safetensors").write_bytes(found["after"])
        model = PeftModel.from_pretrained(mixture(), tmp_path).merge_and_unload()
        alone = mixture_alone[0]
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, alone(tokens()).logits)


def test_a_base_in_bfloat16_with_values_in_float32(torch_runs):
    alone = task.train(task.adapted_llama(dtype=torch.bfloat16), task.llama_loss)
    assert all(value.dtype == torch.float32 for value in alone.values.values())
    for result in results(torch_runs, "fsdp2_bfloat16_base"):
        assert_same(result, alone, tolerance=1e-3)  # rounding of the half batches


def test_mixed_precision_keeps_the_values_in_float32(torch_runs, llama_alone):
    for result in results(torch_runs, "fsdp2_mixed_precision"):
        assert result.base_intact
        assert result.losses == pytest.approx(llama_alone.losses, rel=1e-3)
        assert all(value.dtype == torch.float32 for value in result.values.values())
        for name, values in llama_alone.values.items():
            torch.testing.assert_close(result.values[name], values, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_file_is_that_of_one_process(torch_runs, file_alone, name):
    assert [found["file"] for found in torch_runs[name]] == [file_alone] * 2


def test_save_pretrained_of_a_sharded_model(torch_runs, tmp_path):
    task.adapted_llama().save_pretrained(tmp_path)
    want = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert [found["written by PEFT"] for found in torch_runs["fsdp2"]] == [want] * 2


def test_a_module_that_is_trained_whole_is_saved_whole(torch_runs, tmp_path):
    alone = task.adapted_llama(modules_to_save=["lm_head"])
    alone.save_pretrained(tmp_path)
    want = (tmp_path / "adapter_model.safetensors").read_bytes()
    head = Adapter.load(tmp_path).tensors["lm_head.weight"]
    for found in torch_runs["fsdp2_trains_a_module_whole"]:
        assert found["written"] == want
        assert torch.equal(found["taken"], head)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("fsdp2_does_not_merge", ""), ("fsdp2_does_not_merge_experts", "mlp.experts.down_proj: ")],
)
def test_a_sharded_weight_is_not_merged_into(torch_runs, name, weight):
    for found in torch_runs[name]:
        assert found["error"].startswith(f"MergeError: model.layers.0.{weight}")


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("linear", "self_attn.q_proj.weight"), ("experts", "mlp.experts."), ("compiled", "")],
)
def test_an_adapter_that_was_added_to_a_sharded_model_does_not_train(torch_runs, name, parameter):
    for found in torch_runs["fsdp2_adapted_after"]:
        assert "RankMismatchError: adapter 'default', parameter 'model.layers.0." in found[name]
        assert parameter in found[name]
        assert "Add the adapter first" in found[name]


def test_ddp_does_not_send_the_positions_around(torch_runs):
    assert [found["sent"] for found in torch_runs["ddp"]] == [[], []]


@pytest.mark.parametrize("way", ["ddp", "ddp without buffers", "fsdp2", "compiled", "copied"])
def test_different_positions_stop_the_run_on_every_rank(torch_runs, way):
    for found in torch_runs["different_positions"]:
        assert "RankMismatchError" in found[way]
        assert "adapter 'default', parameter 'model.layers.0." in found[way]
        assert "ranks 0 and 1 train different positions" in found[way]


@needs_deepspeed
@pytest.mark.parametrize("name", ZERO_LLAMA)
def test_zero_on_a_language_model(zero_runs, llama_alone, name):
    for result in results(zero_runs, name):
        assert_same(result, llama_alone)


@needs_deepspeed
@pytest.mark.parametrize("name", ZERO_EVERYTHING)
def test_zero_on_every_layer_type(zero_runs, everything_alone, name):
    for result in results(zero_runs, name):
        assert_same(result, everything_alone)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_writes_the_file_of_one_process(zero_runs, file_alone, name):
    assert [found["file"] for found in zero_runs[name]] == [file_alone] * 2


@needs_deepspeed
def test_zero_with_a_base_in_parts_and_a_mask_from_weights(zero_runs, tmp_path):
    model = task.adapted_llama(mask_type="magnitude")
    file, fingerprint = task.save(model, tmp_path), model.peft_config["default"].base_fingerprint
    alone = task.train(model, task.llama_loss)
    for result in results(zero_runs, "zero3_partitioned_before"):
        assert_same(result, alone)
    for found in zero_runs["zero3_partitioned_before"]:
        assert found["fingerprint"] == fingerprint
        assert found["file"] == file


@needs_deepspeed
def test_zero_lets_the_values_go_after_use(zero_runs):
    assert [found["left"] for found in zero_runs["zero3"]] == [[], []]


@needs_deepspeed
def test_zero_with_different_positions_stops_on_every_rank(zero_runs):
    for found in zero_runs["zero3_different_positions"]:
        assert "RankMismatchError" in found
