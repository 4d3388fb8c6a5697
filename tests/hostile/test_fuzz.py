# SPDX-License-Identifier: Apache-2.0
"""Sound files with a few bytes or words changed, a fixed number of times, by a fixed seed.

Of a compact file each change ends in a `FileFormatError` or changes nothing of the adapter (blanks
in the JSON, say): the checksum sees to that. PEFT's format has none, so a changed value may be
loaded as the value that it now is; then the adapter at least is a sound one.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shira.adapter import Adapter
from shira.errors import FileFormatError, WrongBaseError
from shira.support import Support
from tests.hostile import compact_files, peft_files
from tests.pages import DOCS

ROUNDS = 1500  # for each format

Bytes = bytearray


def flip_a_bit(raw: Bytes, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def write_a_byte(raw: Bytes, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))


def cut(raw: Bytes, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def leave_out(raw: Bytes, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    del raw[at : at + rng.randrange(1, 17)]


def put_in(raw: Bytes, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    raw[at:at] = rng.randbytes(rng.randrange(1, 17))


def repeat_a_part(raw: Bytes, rng: random.Random) -> None:
    start = rng.randrange(len(raw))
    part = raw[start : start + rng.randrange(1, 65)]
    at = rng.randrange(len(raw))
    raw[at:at] = part


def swap_two_parts(raw: Bytes, rng: random.Random) -> None:
    size = rng.randrange(1, 17)
    one, other = (rng.randrange(max(1, len(raw) - size)) for _ in range(2))
    raw[one : one + size], raw[other : other + size] = (
        raw[other : other + size],
        raw[one : one + size],
    )


NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**32 + 1, 2**62, 2**64, 10**30, 0.5, 1e400, True, None)
WORDS = ('"U8"', '"F32"', '"gaps"', '"seed"', '""', "[]", "{}", '"shira"', '"a.weight"')


def change_a_word(raw: Bytes, rng: random.Random) -> None:
    """Another number, text or list in the header, whose length is put right."""
    length = int.from_bytes(raw[:8], "little")
    header = bytes(raw[8 : 8 + length]).decode("latin-1")
    words = list(re.finditer(r'-?\d+(\.\d+)?|\\?"[^"\\]*\\?"', header))
    if length > len(raw) or not words:
        return
    word = rng.choice(words)
    escaped = "\\" if word[0].startswith("\\") else ""
    new = (
        json.dumps(rng.choice(NUMBERS))
        if word[0][0] in "-0123456789"
        else rng.choice(WORDS).replace('"', f'{escaped}"')
    )
    text = (header[: word.start()] + new + header[word.end() :]).encode("latin-1")
    raw[: 8 + length] = struct.pack("<Q", len(text)) + text


def move_a_number(raw: Bytes, rng: random.Random) -> None:
    """A number of the header by one or two: offsets, shapes and counts that are nearly right."""
    length = int.from_bytes(raw[:8], "little")
    numbers = list(re.finditer(rb"\d+", bytes(raw[8 : 8 + length])))
    if length > len(raw) or not numbers:
        return
    at = rng.choice(numbers)
    text = bytearray(raw[8 : 8 + length])
    text[at.start() : at.end()] = str(abs(int(at[0]) + rng.choice((-2, -1, 1, 2)))).encode()
    raw[: 8 + length] = struct.pack("<Q", len(text)) + text


CHANGES: tuple[Callable[[Bytes, random.Random], None], ...] = (
    flip_a_bit, flip_a_bit, write_a_byte, cut, leave_out, put_in, repeat_a_part, swap_two_parts,
    change_a_word, change_a_word, move_a_number,
)  # fmt: skip


def changed(sound: bytes, rng: random.Random) -> bytes:
    raw = bytearray(sound)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if raw:
            rng.choice(CHANGES)(raw, rng)
    return bytes(raw)


def test_compact(tmp_path: Path) -> None:
    rng = random.Random(20260101)
    path = compact_files.write_sound(tmp_path / compact_files.NAME)
    sound, expected = path.read_bytes(), Adapter.load(path)
    refused = accepted = 0
    for turn in range(ROUNDS):
        raw = changed(sound, rng)
        path.write_bytes(raw)
        try:
            found = Adapter.load(path, mapped=turn % 2 == 1)
        except FileFormatError as error:
            refused += str(path) in str(error)  # or the count below falls short
        else:
            assert found == expected, f"turn {turn}"
            assert found.metadata == expected.metadata, f"turn {turn}"
            accepted += 1
    assert refused + accepted == ROUNDS
    assert refused > 0.95 * ROUNDS


@pytest.mark.parametrize("part", [peft_files.WEIGHTS, peft_files.CONFIG])
def test_peft(part: str, tmp_path: Path) -> None:
    rng = random.Random(20260102)
    sound = tmp_path / "sound"
    peft_files.write_sound(sound)
    config = {**peft_files.sound_config(), "shira_shapes": {peft_files.PARAMETER: [8, 6]}}
    (sound / peft_files.CONFIG).write_text(json.dumps(config))
    folder = tmp_path / "adapter"
    shutil.copytree(sound, folder)
    content = (sound / part).read_bytes()
    refused = accepted = 0
    for turn in range(ROUNDS // 2):
        (folder / part).write_bytes(changed(content, rng))
        try:
            found = Adapter.load(folder, base={peft_files.PARAMETER: (8, 6)})
        except (FileFormatError, WrongBaseError) as error:
            refused += str(folder) in str(error)  # or the count below falls short
        else:
            check_sound(found, turn)
            accepted += 1
    assert refused + accepted == ROUNDS // 2
    assert refused > 0.3 * ROUNDS // 2


def check_sound(adapter: Adapter, turn: int) -> None:
    for name, delta in adapter.items():
        assert (name, delta.support.shape) == (peft_files.PARAMETER, (8, 6)), f"turn {turn}"
        assert Support((8, 6), delta.support.indices) == delta.support
        assert bool(torch.isfinite(delta.values).all()), f"turn {turn}"
        assert delta.values.is_floating_point()


def test_the_docs_have_the_counts() -> None:
    kinds = len(compact_files.HOSTILE) + len(peft_files.HOSTILE)
    assert f"({kinds} kinds, {2 * ROUNDS:,} mutations)" in (DOCS / "compared.md").read_text()
