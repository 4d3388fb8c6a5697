# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from shira.errors import FileFormatError
from shira.store.header import EntryError, check_values, open_tensors
from tests.hostile.peft_files import entry, raw_file

READABLE = [
    torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", READABLE)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3)])
def test_tensors_are_read_as_the_library_reads_them(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    raw = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
    save_file({"first": torch.ones(3), "x": raw.to(dtype)}, tmp_path / "f")
    with open_tensors(tmp_path / "f") as file:
        read = file.read("x")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8) if shape else read, raw.to(dtype).view(torch.uint8)
                       if shape else raw.to(dtype))  # fmt: skip
    read.zero_()  # memory of its own, and writable


def test_header_says_what_is_there(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float8_e4m3fn)},
              tmp_path / "f", metadata={"format": "pt"})  # fmt: skip
    with open_tensors(tmp_path / "f") as file:
        assert {name: (told.dtype, told.shape) for name, told in file.tensors.items()} == {
            "a": ("F32", (2, 3)),
            "b": ("F8_E4M3", (4,)),
        }
        assert file.metadata == {"format": "pt"}
        with pytest.raises(FileFormatError, match="F8_E4M3"):
            file.read("b")


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50, 0x80 + 2**16])
def test_a_length_that_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    """The first bytes of a sound file may be 0x80 or 'PK'."""
    text = json.dumps({"a": entry("F32", [1], 0, 4)}).encode().ljust(length)
    (tmp_path / "f").write_bytes(raw_file(text, bytes(4)))
    with open_tensors(tmp_path / "f") as file:
        assert file.tensors["a"].shape == (1,)
    assert load((tmp_path / "f").read_bytes())["a"].tolist() == [0.0]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_sizes_of_less_than_a_byte(tmp_path: Path, dtype: str) -> None:
    bits = {"F4": 4, "F6_E2M3": 6}[dtype]
    (tmp_path / "f").write_bytes(raw_file({"a": entry(dtype, [8], 0, bits)}, bytes(bits)))
    with open_tensors(tmp_path / "f") as file:
        assert file.tensors["a"].dtype == dtype
    (tmp_path / "f").write_bytes(raw_file({"a": entry(dtype, [7], 0, bits)}, bytes(bits)))
    with pytest.raises(FileFormatError, match="size"), open_tensors(tmp_path / "f"):
        pass


SOUND = save({"a": torch.arange(4.0), "b": torch.arange(6, dtype=torch.int32).reshape(2, 3)})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    st.integers(0, len(SOUND)),
)
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], keep: int
) -> None:
    """Whatever bytes change, the reader refuses in its own words or reads as the library does."""
    damaged = bytearray(SOUND)
    for at, byte in changes:
        damaged[at] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    for content in (bytes(damaged), SOUND[:keep]):
        path.write_bytes(content)
        try:
            with open_tensors(path) as file:
                read = {
                    name: file.read(name)
                    for name, told in file.tensors.items()
                    if told.dtype in ("F32", "I32")
                }
        except FileFormatError:
            continue
        theirs = load(content)
        assert all(
            torch.equal(t.view(torch.uint8), theirs[n].view(torch.uint8)) for n, t in read.items()
        )


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    content = save({"a": torch.zeros(100_000)})  # more than Python reads ahead
    path.write_bytes(content)
    with open_tensors(path) as file:
        path.write_bytes(content[:-4])
        with pytest.raises(FileFormatError, match="'a': truncated"):
            file.read("a")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    """Wherever it is: what looks for it works on many values at a time."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_values(values)
    for at in range(200):
        spoilt = values.clone()
        spoilt[at] = bad
        counts = "1 NaN and 0 infinite" if math.isnan(bad) else "0 NaN and 1 infinite"
        with pytest.raises(EntryError, match=f"{counts} of 200"):
            check_values(spoilt)


def test_no_values() -> None:
    check_values(torch.empty(0))
    check_values(torch.tensor([torch.finfo(torch.float32).max]))
