# SPDX-License-Identifier: Apache-2.0
"""All ranks agree or none changes.

`agree` runs a step on every rank and lets it count only if it went well on all of them; the same
error is raised everywhere otherwise. A switch is two of them: prepare and check, then write; a
rank that hears in the second that another failed puts its own weights back. How ranks talk is a
`Ranks`: one process alone, or whatever groups an engine has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from shira import errors
from shira.errors import ServeError, ShiraError

T = TypeVar("T")


class Ranks(Protocol):
    """The processes that hold parts of one model."""

    @property
    def rank(self) -> int:
        """This one's number."""

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank; each rank calls it in the same order."""


class Alone:
    """One process with the whole model."""

    rank = 0

    def gather(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]


class Failure(NamedTuple):
    """An error on its way between processes."""

    kind: str
    message: str
    rank: int

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failure:
        """What is sent of an error."""
        return cls(type(error).__name__, str(error), rank)

    def error(self, several: bool = False) -> Exception:
        """The error again: of its own type if it was ours or about a file, else a `ServeError`."""
        where = f"rank {self.rank}: " if several else ""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, ShiraError):
            return kind(f"{where}{self.message}")
        if self.kind in _BUILTIN:
            return _BUILTIN[self.kind](f"{where}{self.message}")
        return ServeError(f"{where}{self.kind}: {self.message}")


_BUILTIN: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (FileNotFoundError, IsADirectoryError, PermissionError)
}


def agree(ranks: Ranks, step: Callable[[], T]) -> T:
    """Run a step on every rank; its result if it went well on all of them.

    Raises:
        Exception: The error of the first rank on which it did not, on every rank.
        ServeError: If another rank cannot be reached.
    """
    result, failure = None, None
    try:
        result = step()
    except Exception as error:
        failure, cause = Failure.of(error, ranks.rank), error
    everyone = gather(ranks, failure)
    failures = [Failure(*each) for each in everyone if each is not None]
    if failures:
        raise failures[0].error(len(everyone) > 1) from (cause if failure else None)
    return result  # type: ignore[return-value]  # the step went well


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """Everyone's value, by rank.

    Raises:
        ServeError: If another rank cannot be reached.
    """
    try:
        return ranks.gather(value)
    except Exception as error:
        raise ServeError(f"another rank cannot be reached: {error}") from error
