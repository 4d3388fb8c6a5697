# SPDX-License-Identifier: Apache-2.0
"""``shira switch-bench`` on weights small enough to take no time."""

from __future__ import annotations

import json

import pytest
import torch

from shira import Adapter
from shira.cli.switch_bench import contenders
from shira.ops import native

SMALL = ("--shape", "48x32", "--rank", "2", "--repeats", "2")


def test_made_up_weights(shira):
    answer = shira("switch-bench", *SMALL, "--layers", "3", "--json")
    assert answer.status == 0
    result = json.loads(answer.out)
    assert result["base_equal_bit_for_bit"] is True
    assert result["weights"] == 3
    assert result["parameters"] == 3 * 48 * 32
    assert result["entries"] == {"a": 3 * 2 * 80, "b": 3 * 2 * 80}
    for way in ("there_and_back", "onwards"):
        assert len(result["switch_seconds"][way]["samples"]) == 2
    one = result["one_weight"]
    assert one["shape"] == [48, 32]
    assert one["lora_rank"] == 2
    assert set(one["seconds"]) == {"shira", "shira_in_peft", "peft_shira", "peft_lora"}


def test_what_a_person_reads(shira):
    answer = shira("switch-bench", *SMALL)
    assert answer.status == 0
    for words in ("activate, deactivate", "PEFT's LoRA", "The base came back bit for bit."):
        assert words in answer.out
    assert "PEFT" not in shira("switch-bench", *SMALL, "--no-compare").out


def test_adapters_on_disk(shira, tmp_path):
    shapes = {"block.0.weight": (16, 8), "head.weight": (4, 4)}
    for seed, name in enumerate(("one", "two")):
        contenders.random_adapter(shapes, 1, seed).save(tmp_path / name)
    paths = [tmp_path / "one", tmp_path / "two"]
    answer = shira("switch-bench", *paths, "--no-compare", "--repeats", "1", "--json")
    result = json.loads(answer.out)
    assert list(result["entries"]) == [str(path) for path in paths]
    assert result["parameters"] == 16 * 8 + 4 * 4
    alone = json.loads(shira("switch-bench", paths[0], "--no-compare", "--json").out)
    assert set(alone["switch_seconds"]) == {"there_and_back"}


def test_an_adapter_without_parameters(shira, tmp_path):
    path = tmp_path / "a.safetensors"
    Adapter({}).save(path)
    answer = shira("switch-bench", path, "--repeats", "1", "--json")
    assert json.loads(answer.out)["entries"] == {str(path): 0}


def test_without_compiled_kernels_there_is_no_limit(shira, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "no compiler was there"))
    result = json.loads(shira("switch-bench", *SMALL, "--no-compare", "--json").out)
    assert result["limit_seconds"] is None
    assert result["kernels"] == "no compiler was there"
    assert "no compiler was there" in shira("switch-bench", *SMALL, "--no-compare").out


def test_a_base_that_does_not_come_back_is_status_1(shira, monkeypatch):
    digests = iter("ab")
    monkeypatch.setattr(contenders, "digest", lambda module: next(digests))
    answer = shira("switch-bench", *SMALL, "--no-compare")
    assert answer.status == 1
    assert "DID NOT come back" in answer.out


def test_the_digest_sees_every_bit():
    module = contenders.module_of({"a.b": (3, 5), "c": (7,)}, torch.bfloat16)
    before = contenders.digest(module)
    assert contenders.digest(module) == before
    module.c.data[6] = -module.c.data[6]
    assert contenders.digest(module) != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "48"), "ROWSxCOLUMNS"),
        (("--shape", f"{10**9}x{10**11}"), "ROWSxCOLUMNS"),
        (("--dtype", "bfloat"), "Did you mean 'bfloat16'"),
        (("missing",), "missing: no such file"),
    ],
)
def test_mistakes(shira, arguments, message):
    answer = shira("switch-bench", *arguments)
    assert answer.status == 2
    assert message in answer.err


def test_adapters_of_different_bases(shira, tmp_path):
    for name, shape in (("one", (16, 8)), ("two", (8, 16))):
        adapter: Adapter = contenders.random_adapter({"x.weight": shape}, 1, 0)
        adapter.save(tmp_path / name)
    answer = shira("switch-bench", tmp_path / "one", tmp_path / "two")
    assert answer.status == 2
    assert "'x.weight' has shape (16, 8) in" in answer.err
    assert "they are adapters of different models" in answer.err


def test_whole_tensors_are_refused_by_name(shira, tmp_path):
    sparse = contenders.random_adapter({"x.weight": (16, 8)}, 1, 0)
    Adapter(sparse, tensors={"head.weight": torch.ones(2, 8)}).save(tmp_path / "one")
    answer = shira("switch-bench", tmp_path / "one")
    assert answer.status == 2
    assert "switch-bench cannot hold whole tensors, and the adapter has 'head.weight'" in answer.err
