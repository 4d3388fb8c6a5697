# SPDX-License-Identifier: Apache-2.0
"""The processes that hold parts of one model: all agree, or none changes.

`agree` runs a step in every process and lets it count only if it went well in all of them; the same
error is raised everywhere otherwise. A switch is two of them: prepare and check, then write; one
that hears in the second that another failed puts its own weights back. How they talk is a
`Processes`: one alone, or whatever groups an engine has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from shira import errors
from shira.errors import ServeError, ShiraError

T = TypeVar("T")


class Failure(NamedTuple):
    """An error on its way between processes."""

    kind: str
    message: str
    rank: int

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failure:
        """Return what is sent of an error."""
        return cls(type(error).__name__, str(error), rank)

    def error(self, *, name_rank: bool = False) -> Exception:
        """Return the error, of its type if it was ours or about a file, else a `ServeError`."""
        where = f"rank {self.rank}: " if name_rank else ""
        kind = _FILE_ERRORS.get(self.kind, getattr(errors, self.kind, None))
        if isinstance(kind, type) and issubclass(kind, (ShiraError, OSError)):
            return kind(f"{where}{self.message}")
        return ServeError(f"{where}{self.kind}: {self.message}")


_FILE_ERRORS: dict[str, type[OSError]] = {
    kind.__name__: kind for kind in (FileNotFoundError, IsADirectoryError, PermissionError)
}


class Processes(Protocol):
    """The processes that hold parts of one model."""

    @property
    def rank(self) -> int:
        """This one's number."""

    def gather(self, value: Any) -> list[Any]:
        """Return everyone's value, by rank; each process calls it in the same order."""


class OneProcess:
    """One process with the whole model."""

    rank = 0

    def gather(self, value: Any) -> list[Any]:
        """Return the value itself."""
        return [value]


def agree(processes: Processes, step: Callable[[], T]) -> T:
    """Run a step in every process; return its result if it went well in all of them.

    Raises:
        Exception: The error of the first process in which it did not, in every process.
        ServeError: If another process cannot be reached.
    """
    result, failure, cause = None, None, None
    try:
        result = step()
    except Exception as error:
        failure, cause = Failure.of(error, processes.rank), error
    everyone = gather(processes, failure)
    failures = [Failure(*each) for each in everyone if each is not None]
    if failures:
        raise failures[0].error(name_rank=len(everyone) > 1) from cause
    return result  # type: ignore[return-value]  # the step went well


def gather(processes: Processes, value: Any) -> list[Any]:
    """Return everyone's value, by rank.

    Raises:
        ServeError: If another process cannot be reached.
    """
    try:
        return processes.gather(value)
    except Exception as error:
        raise ServeError(f"another rank cannot be reached: {error}") from error
