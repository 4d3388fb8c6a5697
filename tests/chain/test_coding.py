# SPDX-License-Identifier: Apache-2.0
"""A piece of a tensor as what changed in it: the same bits again, whatever they are."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.chain.coding import (
    LONGEST,
    PIECE,
    changed_in,
    decode_piece,
    encode_piece,
    stands_alone,
)
from tests.chain import reference

WIDTHS = st.sampled_from([1, 2, 4, 8])


@st.composite
def pieces(draw):
    """Two pieces: new and old bits, a width."""
    width, count = draw(WIDTHS), draw(st.integers(0, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0, 0.01, 0.1, 0.5, 1]))
    kind = draw(st.sampled_from(["bits", "floats", "zeros"]))
    old = rng.integers(0, 256, count * width, np.uint8)
    if kind == "floats" and width > 1:
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}[width]
        old = (rng.standard_normal(count) * 0.02).astype(dtype).view(np.uint8)
    if kind == "zeros":
        old = np.zeros_like(old)
    new = old.copy()
    where = rng.random(count) < share
    bits = draw(st.integers(1, 8 * width))
    change = rng.integers(0, 2**64, count, np.uint64, endpoint=False) >> np.uint64(64 - bits)
    new.view(f"<u{width}")[where] += change.astype(f"<u{width}")[where]
    return new, old, width


@settings(max_examples=150, deadline=None)
@given(pieces())
def test_any_bits_come_back(drawn):
    new, old, width = drawn
    kept = old.copy()
    coded = encode_piece(new, old, width)
    assert (decode_piece(coded, old, new.size, width) == new).all()
    assert (old == kept).all()
    assert reference.decoded(coded, old.tobytes(), new.size // width, width) == new.tobytes()
    assert (coded == b"") == bool((new == old).all())
    alone = encode_piece(new, None, width)
    assert stands_alone(alone)
    assert (decode_piece(alone, None, new.size, width) == new).all()
    assert reference.decoded(alone, None, new.size // width, width) == new.tobytes()
    assert len(coded) <= new.size + 1 + 4 * width  # whole and not deflated


@pytest.mark.parametrize(
    ("dtype", "special"),
    [
        (torch.float32, [0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000, 0xFF800000, 1]),
        (torch.bfloat16, [0x7FC1, 0xFFFF, 0x8000, 0x7F80, 0xFF80, 1]),
        (torch.float16, [0x7E01, 0xFFFF, 0x8000, 0x7C00, 0xFC00, 1]),
    ],
)
def test_payloads_of_nan_and_signs_of_zero_are_bits(dtype, special):
    width = dtype.itemsize
    old = torch.zeros(64, dtype=dtype).view(torch.uint8).numpy()
    new = old.copy()
    new.view(f"<u{width}")[: len(special)] = special
    for there, here in ((old, new), (new, old)):
        coded = encode_piece(here, there, width)
        assert changed_in(coded, 64) in (len(special), 64)
        assert decode_piece(coded, there, here.size, width).tobytes() == here.tobytes()


def step(count: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """A bfloat16 weight before and after a step of one size for all, kept in float32 beside."""
    torch.manual_seed(0)
    exact = torch.randn(count) * 0.03
    update = rate * torch.randn(count)
    parts = [exact.bfloat16(), (exact - update).bfloat16()]
    before, after = (part.view(torch.uint8).numpy() for part in parts)
    return after, before


def test_a_step_takes_at_most_1_6_bytes_a_changed_entry():
    new, old = step(2**20, 6e-7)
    coded = encode_piece(new, old, 2)
    changed = int((new.view(np.uint16) != old.view(np.uint16)).sum())
    assert 0.005 < changed / 2**20 < 0.02
    assert changed_in(coded, 2**20) == changed
    assert len(coded) / changed < 1.6


def test_more_changes_never_take_more_than_the_piece():
    for rate in (1e-5, 1e-3, 1e-1):
        new, old = step(2**16, rate)
        coded = encode_piece(new, old, 2)
        assert len(coded) <= len(encode_piece(new, None, 2))
        assert (decode_piece(coded, old, new.size, 2) == new).all()


def test_what_becomes_short_as_a_whole_is_stored_whole():
    old = np.random.default_rng(0).integers(0, 256, 2**16, np.uint8)
    coded = encode_piece(np.zeros_like(old), old, 2)
    assert stands_alone(coded)
    assert len(coded) < 500


@settings(max_examples=300, deadline=None)
@given(pieces(), st.data())
def test_spoiled_bytes_are_refused_or_a_piece(drawn, data):
    new, old, width = drawn
    coded = bytearray(encode_piece(new, old, width))
    for _ in range(data.draw(st.integers(1, 3))):
        if coded:
            at = data.draw(st.integers(0, len(coded) - 1))
            coded[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(coded)))
    for spoiled in (bytes(coded), bytes(coded[:cut])):
        try:
            made = decode_piece(spoiled, old, new.size, width)
        except ValueError:
            continue
        assert made.size == new.size


def entries(kind: bytes, bound: int, *positions: tuple[int, int, int]) -> bytes:
    """A coded piece of two lists of positions, told by count, unit and length; all is empty."""
    counts = [count for count, _, _ in positions]
    told = kind + struct.pack("<BII", bound, *counts)
    for _, unit, length in positions:
        told += struct.pack("<BI", unit, length) + bytes(4)
    return told + bytes(8)


@pytest.mark.parametrize(
    ("coded", "says"),
    [
        (b"\3", "unknown coding 3"),
        (b"\1\0", "positions cannot be read"),
        (b"\2" + b"\xff\xff\xff\xff" * 2, "longer than what is there"),
        (entries(b"\1", 0, (0, 1, 0), (255, 1, 0)), "more entries are listed"),
        (entries(b"\1", 0, (0, 1, 0), (0, 4, 2**30)), "more entries are listed"),
        (entries(b"\1", 0, (0, 3, 0), (0, 1, 0)), "more entries are listed"),
        (entries(b"\1", 0, (0, 1, 0), (0, 1, 0)) + b"more", "bytes follow"),
    ],
)
def test_what_is_wrong_is_said(coded, says):
    with pytest.raises(ValueError, match=says):
        decode_piece(coded, np.zeros(32, np.uint8), 32, 2)


def test_a_plane_that_inflates_to_more_is_refused_before_it_does():
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    short = bomb.compress(bytes(10**7)) + bomb.flush()
    coded = b"\2" + len(short).to_bytes(4, "little") + short
    with pytest.raises(ValueError, match="does not inflate to 20000 bytes"):
        decode_piece(coded, None, 20_000, 1)


def test_no_coded_piece_is_longer_than_the_limit():
    assert PIECE + 1 + 4 * 8 < LONGEST
