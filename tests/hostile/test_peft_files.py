# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from shira.adapter import Adapter
from shira.errors import FileFormatError, ShiraError
from shira.store import read_peft
from tests.hostile import peft_files as hostile
from tests.hostile.peft_files import HOSTILE, Hostile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hostile.write_sound(tmp_path / "adapter")


BASE = {hostile.PARAMETER: hostile.SHAPE, "head.weight": (3, 8)}


def base_for(kind: Hostile) -> dict[str, tuple[int, ...]] | None:
    return None if kind.name.startswith("shapes_") else BASE


def test_the_sound_folder_is_accepted(folder: Path) -> None:
    adapter = Adapter.load(folder, base=BASE)
    assert adapter[hostile.PARAMETER].support.indices.tolist() == [5, 6, 9, 44]


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.name)
def test_load_names_file_tensor_and_cause(kind: Hostile, folder: Path) -> None:
    kind.spoil(folder)
    with pytest.raises(FileFormatError) as caught:
        Adapter.load(folder, base=base_for(kind))
    message = str(caught.value)
    assert isinstance(caught.value, ShiraError)
    assert str(folder) in message
    assert kind.file in message or kind.name == "only_a_bin"
    assert kind.cause in message
    assert kind.tensor is None or kind.tensor in message
    assert len(message) < 1000


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.name)
def test_read_peft_refuses_all_that_needs_no_shapes(kind: Hostile, folder: Path) -> None:
    kind.spoil(folder)
    if kind.needs_shapes:
        assert read_peft(folder).tensors
    else:
        with pytest.raises(FileFormatError):
            read_peft(folder)


def test_without_shapes_the_error_asks_for_the_base(folder: Path) -> None:
    with pytest.raises(FileFormatError, match=r"base=model"):
        Adapter.load(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Adapter.load(tmp_path / "absent")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(folder: Path) -> None:
    (folder / hostile.WEIGHTS).unlink()
    os.mkfifo(folder / hostile.WEIGHTS)
    with pytest.raises(FileFormatError, match="not a regular file"):
        Adapter.load(folder, base=BASE)
