# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shira.adapter import Adapter
from shira.errors import FileFormatError, WrongBaseError
from shira.store import read_compact
from tests.hostile import compact_files as hostile
from tests.hostile.compact_files import HOSTILE, Hostile


def test_the_sound_file_is_accepted(tmp_path: Path) -> None:
    path = hostile.write_sound(tmp_path / hostile.NAME)
    read = read_compact(path)
    sound = hostile.sound_adapter()
    assert [record.indices for record in read.records.values()] == ["gaps", "blocks", "seed"]
    assert [record.values for record in read.records.values()] == ["BF16", "F16", "I8"]
    assert {name: delta.support for name, delta in read.adapter.items()} == {
        name: delta.support for name, delta in sound.items()
    }
    for name in (hostile.GAPS, hostile.BLOCKS):
        assert read.adapter[name] == sound[name]
    assert read.adapter[hostile.SEED].values.tolist() == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    assert read.adapter.metadata == sound.metadata


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.name)
def test_load_names_file_and_cause(kind: Hostile, mapped: bool, tmp_path: Path) -> None:
    path = tmp_path / hostile.NAME
    path.write_bytes(kind.spoil())
    with pytest.raises(FileFormatError) as caught:
        Adapter.load(path, mapped=mapped)
    message = str(caught.value)
    assert str(path) in message
    assert all(part in message for part in kind.says), message
    assert len(message) < 1000


def test_every_kind_differs_from_the_sound_file() -> None:
    """And so does the file that `compose` makes of the sound parts not: the cause is the kind's."""
    kinds = {kind.spoil() for kind in HOSTILE}
    assert hostile.sound_bytes() not in kinds
    assert len(kinds) == len(HOSTILE) == len({kind.name for kind in HOSTILE})
    assert hostile.compose(hostile.take_apart(hostile.sound_bytes())) == hostile.sound_bytes()


@pytest.mark.parametrize(
    ("base", "error", "match"),
    [
        ({**hostile.SHAPES, "a.weight": (6, 8)}, WrongBaseError, r"a\.weight.*\(8, 6\).*\(6, 8\)"),
        ({"a.weigth": (8, 6)}, FileFormatError, r"a\.weight.*Did you mean 'a\.weigth'"),
    ],
)
def test_a_base_it_does_not_fit(
    base: dict[str, tuple[int, ...]], error: type[Exception], match: str, tmp_path: Path
) -> None:
    path = hostile.write_sound(tmp_path / hostile.NAME)
    assert Adapter.load(path, base={**hostile.SHAPES, "other": (1,)}).nnz == 4 + 34 + 7
    with pytest.raises(error, match=match):
        Adapter.load(path, base=base)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = hostile.sound_bytes()
    path = tmp_path / hostile.NAME
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"truncated|not safetensors|JSON"):
            Adapter.load(path)


def test_mapped_values_are_private(tmp_path: Path) -> None:
    path = hostile.write_sound(tmp_path / hostile.NAME)
    before = path.read_bytes()
    adapter = Adapter.load(path, mapped=True)
    adapter[hostile.GAPS].values.zero_()
    assert not adapter[hostile.GAPS].values.any()
    assert path.read_bytes() == before
    assert torch.equal(
        Adapter.load(path)[hostile.GAPS].values, hostile.sound_adapter()[hostile.GAPS].values
    )
