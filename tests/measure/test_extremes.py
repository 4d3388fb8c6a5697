# SPDX-License-Identifier: Apache-2.0
"""Figures of values up to the ends of their dtypes, against exact fractions.

The square of 1e308 is infinite in float64 and that of 5e-324 zero, but cosines, ranks and means of
such values are ordinary numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira import Adapter, overlap
from shira.cli.summary import Figures
from shira.errors import AdapterError
from shira.measure import compare, numerical_rank
from shira.measure.figures import Scaled, dot, ldexp, near_one, total
from tests.adapters import delta, few

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LARGEST = torch.finfo(torch.float64).max
anything = st.floats(allow_nan=False, allow_infinity=False)
likely = st.one_of(
    anything, st.sampled_from([0.0, -0.0, 1.0, 1e308, -1e308, LARGEST, 5e-324, -5e-324, 2.3e-308])
)
lists = st.lists(likely, max_size=6)


def ends(dtype):
    """The largest, the smallest normal and the smallest value of a dtype."""
    info = torch.finfo(dtype)
    return [info.max, info.tiny, float(torch.tensor(info.tiny * info.eps, dtype=dtype))]


def exact(number: Scaled) -> Fraction:
    return Fraction(number[0]) * Fraction(2) ** number[1]


def near(found: float, wanted: Fraction, of: Fraction | None = None) -> bool:
    """Equal to 1e-9 of a size, or to one step of float64 where steps are coarser."""
    size = abs(wanted) if of is None else of
    return abs(Fraction(found) - wanted) <= size / 10**9 + Fraction(5e-324)


def root(number: Fraction) -> Fraction:
    """Its square root, to 60 bits."""
    if not number:
        return number
    bits = number.denominator.bit_length() - number.numerator.bit_length() + 122
    bits += bits % 2  # an even power of two, taken out again after the root
    scaled = number * Fraction(2) ** bits
    return Fraction(math.isqrt(scaled.numerator // scaled.denominator)) / Fraction(2) ** (bits // 2)


@few
@given(likely, st.integers(-2200, 2200))
def test_scaled_numbers_as_floats(a, power):
    found = ldexp(a, power)
    try:
        assert found == math.ldexp(a, power)
    except OverflowError:
        assert found == math.copysign(math.inf, a)


@few
@given(lists)
def test_values_near_one_are_the_values(numbers):
    values = torch.tensor(numbers, dtype=torch.float64)
    scaled, exponent = near_one(values)
    if values.any():
        assert 0.5 <= float(scaled.abs().max()) < 1
    small = scaled.abs() < 1e-290  # what vanishes beside the largest
    again = torch.tensor([ldexp(v, exponent) for v in scaled.tolist()], dtype=torch.float64)
    assert torch.equal(again[~small], values[~small])


@few
@given(lists)
def test_sums_of_squares(numbers):
    values = torch.tensor(numbers, dtype=torch.float64)
    wanted = sum((Fraction(x) ** 2 for x in numbers), Fraction())
    assert abs(exact(dot(values, values)) - wanted) <= wanted / 10**12
    assert total([]) == total([(0.0, 0), (0.0, 7)]) == (0.0, 0)
    assert abs(exact(total(math.frexp(x) for x in numbers)) - sum(map(Fraction, numbers))) <= (
        sum(abs(Fraction(x)) for x in numbers) / 2**52
    )


@few
@given(lists)
def test_means_and_spread(numbers):
    found = asdict(Figures.of([torch.tensor(numbers, dtype=torch.float64)]))
    halves = [torch.tensor(numbers[i::2], dtype=torch.float64) for i in (0, 1)]
    assert all(value is None or math.isfinite(value) for value in found.values())
    if not numbers:
        assert found["mean_abs"] is None
        return
    exactly = [Fraction(x) for x in numbers]
    mean = sum(exactly) / len(numbers)
    absolute = sum(map(abs, exactly)) / len(numbers)
    assert near(found["mean_abs"], absolute)
    variance = sum((x - mean) ** 2 for x in exactly) / len(numbers)
    size = max(map(abs, exactly))  # the difference of two sums: to half the digits
    assert abs(Fraction(found["std"]) - root(variance)) <= size / 10**7 + Fraction(5e-324)
    assert Figures.of(halves).mean_abs == pytest.approx(found["mean_abs"], rel=1e-12, abs=5e-324)


shared_values = st.lists(st.tuples(likely, likely), min_size=1, max_size=6)


@few
@given(shared_values, shared_values)
def test_cosine_awom_and_differences(one, other):
    """Two parameters with one entry in each row of one column, so that AWOM is a plain sum."""
    a, b = (
        Adapter(
            {
                name: delta((6, 1), {i: pair[which] for i, pair in enumerate(pairs)}, torch.float64)
                for name, pairs in (("one", one), ("other", other))
            }
        )
        for which in (0, 1)
    )
    found = overlap(a, b)
    every = [(Fraction(x), Fraction(y)) for x, y in (*one, *other)]
    parts = (every, every[: len(one)], every[len(one) :])
    for of, pairs in zip((found, *found.parameters), parts, strict=True):
        norms = root(sum(x * x for x, _ in pairs)) * root(sum(y * y for _, y in pairs))
        product = sum(x * y for x, y in pairs)
        assert near(of.cosine, product / norms if norms else Fraction(), Fraction(1))
        if of is not found:
            awom = of.awom.value
            if math.isinf(awom):
                assert abs(product) > Fraction(LARGEST) * (1 - Fraction(1, 10**9))
            elif abs(product) > norms / 10**250:  # else it vanishes beside them
                assert near(awom, abs(product))
            else:
                assert near(awom, Fraction(), norms)
    json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert str(found)

    compared = compare(a, b)
    furthest = max(abs(x - y) for x, y in every)
    if math.isinf(compared.largest_difference):
        assert furthest > Fraction(LARGEST)
    else:
        assert near(compared.largest_difference, furthest)
    of_a = root(sum(x * x for x, _ in every))
    wanted = root(sum((x - y) ** 2 for x, y in every)) / of_a if of_a else None
    if wanted is not None and wanted <= Fraction(LARGEST):
        assert near(compared.relative_difference, wanted)
    json.loads(json.dumps(compared.as_json(), allow_nan=False))
    assert str(compared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [512, 3], ids=["exact", "sketch"])
def test_the_rank_does_not_depend_on_the_unit(dtype, limit):
    """A diagonal of rank 6 whose entries are one value; and the same of rank 1."""
    for value in ends(dtype):
        diagonal = numerical_rank(
            delta((6, 6), {7 * i: value for i in range(6)}, dtype), limit=limit
        )
        assert (diagonal.rank, diagonal.bound) == (min(6, limit), 6)
        assert diagonal.stable_rank == pytest.approx(6)
        assert diagonal.spectral_norm.value == pytest.approx(value, rel=1e-9)
        full = numerical_rank(delta((6, 6), dict.fromkeys(range(36), value), dtype), limit=limit)
        assert (full.rank, full.stable_rank) == (1, pytest.approx(1))
        norm = 6 * Fraction(value)  # of the largest float64 it is beyond float64
        if norm > Fraction(LARGEST):
            assert full.spectral_norm.value == math.inf
        else:
            assert full.spectral_norm.value == pytest.approx(float(norm), rel=1e-9)
        json.dumps([diagonal.as_json(), full.as_json()], allow_nan=False)
        assert str(full)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_of_ends_with_itself_and_with_its_negative(dtype):
    values = [sign * value for value in ends(dtype) for sign in (1, -1)]
    a = Adapter({"w": delta((2, 3), dict(enumerate(values)), dtype)})
    b = Adapter({"w": delta((2, 3), {i: -value for i, value in enumerate(values)}, dtype)})
    assert overlap(a, a).cosine == pytest.approx(1)
    assert overlap(a, b).cosine == pytest.approx(-1)
    assert compare(a, a).equal
    assert compare(a, b).relative_difference == pytest.approx(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(bad):
    part = delta((2, 2), {0: 1.0, 3: bad})
    with pytest.raises(AdapterError, match="1 of the 2 values of the delta"):
        numerical_rank(part)
    good = Adapter({"w": delta((2, 2), {0: 1.0})})
    with pytest.raises(AdapterError, match="'w' of adapter 'b'"):
        overlap(good, Adapter({"w": part}))
    assert not compare(good, Adapter({"w": part})).equal
