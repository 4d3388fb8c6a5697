# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shira import Adapter, SparseDelta, Support
from shira.checkpoints import open_checkpoint, shapes_of, without_tied
from shira.errors import FileFormatError


def test_from_a_module() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Embedding(5, 4))
    assert shapes_of(model) == {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (5, 4)}
    assert shapes_of(nn.DataParallel(model)) == shapes_of(model)
    assert shapes_of(torch.compile(model)) == shapes_of(model)  # type: ignore[arg-type]


def test_tied_weights_have_both_names() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    assert shapes_of(model) == {"0.weight": (5, 4), "1.weight": (5, 4)}


def test_from_a_mapping() -> None:
    assert shapes_of({"a.weight": [2, 3], "b.weight": torch.Size((4,))}) == {
        "a.weight": (2, 3),
        "b.weight": (4,),
    }


def test_from_checkpoints_of_one_or_more_files(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.zeros(4)}, tmp_path / "model-00002-of-00002.safetensors")
    assert shapes_of(tmp_path) == {"a.weight": (2, 3), "b.weight": (4,)}
    assert shapes_of(str(tmp_path / "model-00002-of-00002.safetensors")) == {"b.weight": (4,)}


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A checkpoint far larger than memory: a sparse file of 1 TiB."""
    header = (
        b'{"a.weight":{"dtype":"F32","shape":[524288,524288],"data_offsets":[0,1099511627776]}}'
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        with open(path, "r+b") as file:
            file.truncate(8 + len(header) + 2**40)
    except OSError:
        pytest.skip("no sparse files of this size here")
    assert shapes_of(path) == {"a.weight": (2**19, 2**19)}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shapes_of(tmp_path / "absent")
    with pytest.raises(FileFormatError, match="no safetensors"):
        shapes_of(tmp_path)


def test_what_a_checkpoint_does_not_store_since_it_is_tied(tmp_path: Path) -> None:
    """Left out where it is changed alike; a head has to be among what is, for it to change too."""
    save_file({"shared.weight": torch.zeros(8, 4), "q.weight": torch.zeros(4, 4)},
              tmp_path / "model.safetensors")  # fmt: skip
    told = {"architectures": ["T5ForConditionalGeneration"], "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(told))
    checkpoint = open_checkpoint(tmp_path)
    change = SparseDelta(Support((8, 4), torch.tensor([1])), torch.ones(1))
    other = SparseDelta(Support((8, 4), torch.tensor([2])), torch.ones(1))

    def left(tied: dict[str, SparseDelta]) -> tuple[list[str], set[str]]:
        metadata = {"tied_weights": dict.fromkeys(tied, "shared.weight")}
        adapter = Adapter({"shared.weight": change, **tied}, metadata)
        result, heads = without_tied(adapter, checkpoint)
        return [*result], heads

    embedding, head = "encoder.embed_tokens.weight", "lm_head.weight"
    every = {embedding: change, head: change}
    assert left(every) == (["shared.weight"], {"shared.weight"})
    assert left({embedding: change}) == (["shared.weight"], set())  # an encoder's: no head
    assert left({head: other}) == (["shared.weight", head], set())
    assert left({}) == (["shared.weight"], set())
