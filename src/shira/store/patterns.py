# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of module names, refused where matching one could take minutes.

A configuration of 400 bytes can hold a pattern such as ``(a+)+b``, on which Python's matching tries
every way to split a name among the repeats. PEFT matches the name of each module with it, so
patterns are looked at before. From the parsed pattern an upper bound of those ways is computed, for
names of 128 characters in which four given characters in a row are found at most four times.
``.*decoder.*(SelfAttention|EncDecAttention).*(q|v)$`` has about a hundred. Names that come from a
file, too, may be anything, so for those the bound is of their own length and of any characters.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from shira.errors import ConfigError

# How Python parses a pattern; the modules have had these names since 3.11.
c: Any = importlib.import_module(
    "re._constants" if sys.version_info >= (3, 11) else "sre_constants"
)
parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

T = TypeVar("T")

_LENGTH = 128  # characters of a module's name
_FOUND = (1.0, 1 / 4, 1 / 10, 1 / 20, 1 / 32)  # share of its places where n given characters stand
_WAYS = 1_000_000  # of matching a name, at most: some milliseconds
_TOGETHER = 10 * _WAYS  # with all patterns of a configuration
_LONGEST = 50_000  # characters of a pattern
_MOST = 10_000  # patterns in a configuration
_AT_END = r"(.*\.)?({})$"

_ATOMIC = getattr(c, "ATOMIC_GROUP", None)  # from Python 3.11 on
_REPEATS = {c.MAX_REPEAT, c.MIN_REPEAT, getattr(c, "POSSESSIVE_REPEAT", c.MAX_REPEAT)}


def check_patterns(config: Mapping[str, Any], names: Collection[str] | None = None) -> None:
    """Check every pattern in the fields of a configuration of PEFT's, as PEFT uses it.

    ``names`` are those that it will be matched with; None stands for those of a model.

    Raises:
        ConfigError: If one is no regular expression, or matching it, or all, could take minutes.
    """
    ways = 0.0
    for number, (field, pattern, whole) in enumerate(_patterns(config)):
        if number >= _MOST:
            raise ConfigError(f"{field}: more than {_MOST} patterns")
        ways += check_pattern(whole, f"{field}: the pattern {pattern[:200]!r}", names)
        if ways > _TOGETHER:
            raise ConfigError(
                f"{field}: all patterns together could take minutes to match; use fewer of them, "
                "or fewer repeats"
            )


def check_pattern(pattern: str, what: str, names: Collection[str] | None = None) -> float:
    """Return an upper bound of the ways in which one pattern, as it is matched, matches a name.

    Raises:
        ConfigError: If it is no regular expression, or matching it could take minutes.
    """
    told = _Names(_LENGTH, _FOUND, [])
    if names is not None:
        told = _Names(max(map(len, names), default=0), (1.0,), [])
    if len(pattern) > _LONGEST:
        raise ConfigError(f"{what} is too long ({len(pattern)} characters; limit {_LONGEST})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd sets of characters
            ways = _ways(parser.parse(pattern), _END, told) * (1 + sum(told.asserted))
    except (re.error, RecursionError, OverflowError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{what} is no regular expression: {cause}") from error
    if ways > _WAYS:
        raise ConfigError(
            f"{what} could take minutes to match: a repeat within a repeat, or too many repeats in "
            "a row. Use fewer of them, or list the names of the modules"
        )
    return ways


def matching(patterns: Mapping[str, T] | None, name: str, default: T) -> T:
    """Return the value of the first pattern that matches the end of a name, as PEFT matches."""
    found = (value for key, value in (patterns or {}).items() if _compiled(key).match(name))
    return next(found, default)


@functools.lru_cache(2 * _MOST)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(_AT_END.replace("{}", pattern))


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield field, pattern as given, and as PEFT completes it."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(pattern := config.get(field), str):
            yield field, pattern, pattern
    for field, form in (
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
        ("rank_pattern", _AT_END),
        ("alpha_pattern", _AT_END),
    ):
        given = config.get(field) or ()
        for pattern in [given] if isinstance(given, str) else given:
            if isinstance(pattern, str):
                yield field, pattern, form.replace("{}", pattern)


class _Next(NamedTuple):
    """Describe the start of a pattern: its possible first characters, how many are literal."""

    first: int  # a bit for each character of ASCII, and one for all others
    literals: int
    empty: bool  # whether what stands there may match nothing


class _Names(NamedTuple):
    """Describe the names that a pattern is matched with, and collect ways of look-arounds."""

    length: int
    found: Sequence[float]  # as _FOUND
    asserted: list[float]


_OTHERS = 2**128
_ALL = 2**129 - 1
_END = _Next(0, 0, True)


def _ways(items: Any, after: _Next, names: _Names) -> float:
    """Return an upper bound of the ways in which a sequence can match before what follows it.

    Those of look-arounds in it are added to ``names.asserted``: they are tried anew for each.
    """
    ways, repeats = 1.0, 0
    for op, value in reversed(list(items)):
        found = _ways_of(op, value, after, names)
        if op in _REPEATS and found > 1 and value[1] >= names.length:
            repeats += 1
            found = max(found / repeats, 1.0)  # their ends follow one another: L choose n, not L^n
        ways = min(ways * found, 1e100)
        after = _before(op, value, after)
    return ways


def _ways_of(op: Any, value: Any, after: _Next, names: _Names) -> float:
    """Return such a bound for one item of a sequence."""
    if op in (c.ASSERT, c.ASSERT_NOT):
        names.asserted.append(_ways(value[1], _END, names))
        return 1.0
    if op not in _REPEATS:
        parts = _parts(op, value)
        ways = [_ways(part, after, names) for part in parts] or [1.0]
        return sum(ways) if op is c.BRANCH and not _apart(parts, after) else max(ways)
    least, most = (min(int(times), names.length) for times in value[:2])
    body = value[2]
    start = _first(body)
    meet = bool(start.first & after.first) or start.empty
    if most <= 1:
        return _ways(body, after, names) + (1 if meet and not least else 0)
    inner = _ways(body, _any_of([start, after]), names) + (1 if start.empty else 0)
    if inner > 1:  # each round can go several ways
        return math.exp(min(most * math.log(inner), 230.0))
    if not meet or least == most:
        return 1.0
    share: float = names.found[min(after.literals, len(names.found) - 1)]
    width = max(int(body.getwidth()[0]), 1)
    return float(1 + (most - least) / width * share)


def _before(op: Any, value: Any, after: _Next) -> _Next:
    """Return the start of a pattern once an item is put in front of ``after``."""
    if op in (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN):
        characters = _characters(op, value)
        few = characters.bit_count() <= 8  # four letters in both cases
        return _Next(characters, after.literals + 1 if few else 0, False)
    if op is c.GROUPREF:
        return _Next(_ALL, 0, after.empty)
    if op in _REPEATS:
        once = _first(value[2])
        if once.empty:
            once = _any_of([once, after])._replace(empty=after.empty)
        return once if value[0] else _any_of([once, after])
    if parts := _parts(op, value):
        return _any_of([_first(part, after) for part in parts])
    return _END if value in (c.AT_END, c.AT_END_STRING) else after  # look-arounds take no character


def _parts(op: Any, value: Any) -> list[Any]:
    """Return the sequences, one of which stands in the place of a group or a branch."""
    if op is c.BRANCH:
        return list(value[1])
    if op is c.GROUPREF_EXISTS:
        return [branch or [] for branch in value[1:]]
    return [value[-1]] if op is c.SUBPATTERN else [value] if op is _ATOMIC else []


def _first(items: Any, after: _Next = _END) -> _Next:
    for op, value in reversed(list(items)):
        after = _before(op, value, after)
    return after


def _any_of(places: list[_Next]) -> _Next:
    first = 0
    for place in places:
        first |= place.first
    return _Next(first, min(p.literals for p in places), any(p.empty for p in places))


def _apart(branches: list[Any], after: _Next) -> bool:
    """Return whether at most one of the branches can match at any place of a name."""
    texts = []
    for branch in branches:
        literals = itertools.takewhile(lambda item: item[0] is c.LITERAL, branch)
        texts.append("".join(chr(value) for _, value in literals).lower())
    if all(texts):
        texts.sort()
        return not any(two.startswith(one) for one, two in itertools.pairwise(texts))
    seen = 0
    for branch in branches:
        start = _first(branch, after)
        if start.empty or start.first & seen:
            return False
        seen |= start.first
    return True


def _characters(op: Any, value: Any) -> int:
    """Return the characters that an item of one character matches, in either case."""
    if op is c.ANY:
        return _ALL
    items = value if op is c.IN else [(c.LITERAL, value)]
    bits = 0
    for kind, what in items:
        if kind is c.LITERAL:
            bits |= _bits([what])
        elif kind is c.RANGE:
            bits |= _bits(range(what[0], min(what[1], 128) + 1))
        elif kind is c.CATEGORY:
            bits |= _CATEGORIES.get(what, _ALL)
    if op is not c.NOT_LITERAL and items[0][0] is not c.NEGATE:
        return bits
    other_case = bits & _LETTERS if bits & _LETTERS != _LETTERS else 0
    return (_ALL & ~bits) | other_case | _OTHERS


def _bits(codes: Iterable[int]) -> int:
    bits = 0
    for code in codes:
        for text in {chr(code).lower(), chr(code).upper()}:
            bits |= 1 << min(ord(text[0]), 128)
    return bits


_LETTERS = _bits(code for code in range(128) if chr(code).isalpha())
_CATEGORIES = {
    parser.CATEGORIES[text][1][0][1]: _OTHERS
    | _bits(code for code in range(128) if re.match(text, chr(code)))
    for text in (r"\d", r"\D", r"\s", r"\S", r"\w", r"\W")
}
