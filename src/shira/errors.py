# SPDX-License-Identifier: Apache-2.0
"""Everything shira raises on a caller's mistake; the bottom of the tree, imports nothing of shira.

Each error is also the built-in type one would expect, so that code which knows nothing of shira
catches it as usual::

    ShiraError
    |-- ConfigError            (ValueError)   an invalid configuration
    |-- SupportError           (ValueError)   positions out of range, unsorted, repeated
    |-- MaskError              (ValueError)   a mask that does not fit the weight or the budget
    |-- TargetError            (ValueError)   target modules that match nothing or cannot be adapted
    |-- AdapterError           (ValueError)   adapters that do not fit one another or the model
    |   |-- UnknownAdapterError (KeyError)    a name that is not loaded
    |   |-- WrongBaseError                    an adapter of another base model
    |   `-- PlacementError                    a weight that an engine keeps in another form
    |-- FileFormatError        (ValueError)   a file that is damaged, hostile or not an adapter
    |-- MergeError             (RuntimeError) a merge that is not possible now
    |-- ServeError             (RuntimeError) an engine that cannot do it in its present state
    |   `-- RestoreError                      adapters that a new engine could not be given again
    |-- RankMismatchError      (RuntimeError) processes of one run that train different positions
    |-- SwitchError            (RuntimeError) weights that were changed while an adapter was in them
    `-- MissingDependencyError (ImportError)  an optional package that is not installed
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping


class ShiraError(Exception):
    """Base of every error that shira raises on purpose."""


class ConfigError(ShiraError, ValueError):
    """A configuration value that is not possible."""


class SupportError(ShiraError, ValueError):
    """Positions that are out of range, unsorted, repeated or of the wrong type."""


class MaskError(ShiraError, ValueError):
    """A mask that does not fit its weight or its budget."""


class TargetError(ShiraError, ValueError):
    """Target modules that match nothing, or a module that cannot be adapted."""


class AdapterError(ShiraError, ValueError):
    """An adapter that does not fit another adapter or the model."""


class UnknownAdapterError(AdapterError, KeyError):
    """The name of an adapter that is not there."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class WrongBaseError(AdapterError):
    """An adapter that was trained on another base model."""


class PlacementError(AdapterError):
    """A weight that a model does not keep as its checkpoint has it."""


class FileFormatError(ShiraError, ValueError):
    """A file that is damaged, hostile, or no adapter at all."""


class MergeError(ShiraError, RuntimeError):
    """A merge that cannot be done in the present state."""


class ServeError(ShiraError, RuntimeError):
    """A serving engine that cannot do it in its present state."""


class RestoreError(ServeError):
    """Adapters of before that a new engine could not be given again; it has the others.

    Attributes:
        failed: What went wrong, by the adapter's name.
    """

    def __init__(self, message: str, failed: Mapping[str, Exception] | None = None) -> None:
        super().__init__(message)
        self.failed = dict(failed or {})


class RankMismatchError(ShiraError, RuntimeError):
    """Processes of one distributed run that train different positions of a weight."""


class SwitchError(ShiraError, RuntimeError):
    """Weights that somebody else has changed, so that an adapter cannot be put in or taken out."""


class MissingDependencyError(ShiraError, ImportError):
    """An optional package that the call needs is not installed."""


_LONGEST_NAME = 300
_COMPARED = 2_000_000  # pairs of characters
_CUTOFF = 0.6
_CUTOFF_OF_ANOTHER_FORM = 0.8


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint to append to an error message.

    Args:
        name: What the caller wrote.
        known: What would have been right.

    Returns:
        ``" Did you mean 'x' or 'y'?"`` for near names, else an empty string.
    """
    name = str(name)
    if len(name) > _LONGEST_NAME:  # the comparison takes the square of the length
        return ""
    others = sorted(other for other in map(str, known) if len(other) <= _LONGEST_NAME)
    if len(name) * sum(map(len, others)) > _COMPARED:  # of many, those that are alike at both ends
        others.sort(key=lambda other: -_shared_ends(name, other))
        del others[_COMPARED // (len(name) * _LONGEST_NAME) :]
    found = difflib.get_close_matches(name, others, n=12, cutoff=_CUTOFF)
    near = [other for other in found if _is_near(name, other)][:3]
    if not near:
        return ""
    return f" Did you mean {' or '.join(map(repr, near))}?"


def _shared_ends(one: str, other: str) -> int:
    """Return the number of characters that two names begin and end with alike."""
    ends = (zip(one, other, strict=False), zip(reversed(one), reversed(other), strict=False))
    return sum(
        1 for pairs in ends for _ in itertools.takewhile(lambda two: two[0] == two[1], pairs)
    )


def _is_near(name: str, other: str) -> bool:
    """Return whether two names are alike part by part: ``o_proj`` and ``c_proj`` are not."""
    parts, others = (re.split(r"[._/]", text) for text in (name, other))
    if len(parts) != len(others):
        return difflib.SequenceMatcher(None, name, other).ratio() >= _CUTOFF_OF_ANOTHER_FORM
    return all(
        part.startswith(other) or difflib.SequenceMatcher(None, part, other).ratio() >= _CUTOFF
        for part, other in zip(parts, others, strict=True)
    )


def shown(text: object, *, lines: bool = False) -> str:
    r"""Return a text with all that a terminal could obey made visible.

    Control characters, among them line ends and the escape character, characters that change the
    direction of writing or are not seen, and halves of surrogate pairs are written as in Python:
    ``\x1b``, ``\u202e``. Names, paths and metadata come from files that nobody vouches for.

    Args:
        text: What to show.
        lines: Keep line ends and tabs.
    """
    text = str(text)
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def listed(names: Iterable[str]) -> str:
    """Return some names for a message: the first three, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
