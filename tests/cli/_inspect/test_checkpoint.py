# SPDX-License-Identifier: Apache-2.0
"""Looking values up in a base checkpoint: names, several files, what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from shira.cli._inspect.checkpoint import Checkpoint, find_checkpoint
from shira.errors import ConfigError, FileFormatError, WrongBaseError


@pytest.fixture
def folder(tmp_path):
    save_file({"encoder.a.weight": torch.arange(6.0).view(2, 3)}, tmp_path / "one.safetensors")
    save_file({"head.weight": torch.ones(2).bfloat16()}, tmp_path / "two.safetensors")
    return tmp_path


def test_values_of_several_files(folder):
    base = Checkpoint(folder)
    assert base.shape("encoder.a.weight") == (2, 3)
    found = base.values("encoder.a.weight", torch.tensor([5, 1], dtype=torch.int32))
    assert found.tolist() == [5.0, 1.0]
    assert base.values("head.weight", torch.tensor([0])).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["encoder.a.weight", "bert.encoder.a.weight", "a.weight"])
def test_a_prefix_more_or_less_is_the_same_weight(folder, name):
    assert Checkpoint(folder).key(name) == "encoder.a.weight"


def test_a_name_is_not_matched_within_a_word(folder):
    with pytest.raises(WrongBaseError, match=r"no 'der.a.weight'"):
        Checkpoint(folder).key("der.a.weight")


def test_an_ambiguous_name_is_refused(tmp_path):
    save_file(
        {"x.a.weight": torch.ones(1), "y.a.weight": torch.ones(1)}, tmp_path / "f.safetensors"
    )
    with pytest.raises(WrongBaseError, match="any of"):
        Checkpoint(tmp_path).key("a.weight")


def test_an_unknown_name_suggests_a_near_one(folder):
    with pytest.raises(WrongBaseError, match=r"Did you mean 'encoder\.a\.weight'"):
        Checkpoint(folder).key("encoder.b.weight")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"no \.safetensors file"):
        Checkpoint(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not this")
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        Checkpoint(tmp_path / "x.safetensors")


def test_a_model_that_is_nowhere(monkeypatch):
    import huggingface_hub

    def offline(name, **options):
        raise FileNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="'no/model': no such file or folder here"):
        find_checkpoint("no/model")
