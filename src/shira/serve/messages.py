# SPDX-License-Identifier: Apache-2.0
"""Messages of the processes of an engine: what clients ask, what workers answer, how all agree.

`named`, `located`, `wanted` and `slept` check what a client asks, before it is sent and where it
arrives. Each worker answers with a dict (see ``shira.serve.vllm``), all of which `checked` reads.

With mixed batches each request has what a `Carried` says.

`agree` lets a step count only if it went well in every process of a model. A switch is two of
them: prepare and check, then write; a process that hears in the second that another failed puts its
own weights back. How they talk is a `Processes`. Plain values, no engine.
"""

from __future__ import annotations

import builtins
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from shira import errors
from shira.delta import checked_scale
from shira.errors import AdapterError, ConfigError, ServeError, ShiraError

T = TypeVar("T")

Weights: TypeAlias = "str | Mapping[str, float] | None"
"""The adapters to make active: a name, ``{name: scale, ...}``, or None for the base."""


KEY = "shira_adapter"
"""The key in the ``extra_args`` of a request's sampling parameters under which its adapter is."""


BASE_SALT = "shira-base"
"""Keeps blocks of the base whose requests have a salt of their own apart from adapters' blocks."""


class Carried(NamedTuple):
    """The luggage of a request that is answered by adapters of its own."""

    value: str | list[str | float]
    """Under `KEY`: the name of an adapter, or ``[name, scale, name, scale, ...]``."""
    salt: str
    """Keeps its blocks in the prefix cache apart from those of other adapters."""

    def by(self, prompt: Any, parameters: Any) -> tuple[dict[str, Any], Any]:
        """Return a prompt with the salt, and a copy of vLLM's sampling parameters with the rest."""
        parameters = parameters.clone()
        parameters.extra_args = {**(parameters.extra_args or {}), KEY: self.value}
        return salted(prompt, self.salt), parameters


def carried(scales: Mapping[str, float], digests: Mapping[str, str]) -> Carried:
    """Return what requests for these adapters bring along; each has a digest of its content."""
    value: str | list[str | float] = [each for term in scales.items() for each in term]
    if list(scales.values()) == [1.0]:
        value = next(iter(scales))
    state = state_of([(digests[name], scale) for name, scale in scales.items()])
    return Carried(value, f"shira-{state}")


def scales_of(value: object) -> dict[str, float]:
    """Read the value of a `Carried`; none: the base. `AdapterError` if it is no such value."""
    if value is None or isinstance(value, str):
        return wanted(value)
    if not isinstance(value, Sequence) or len(value) % 2 or not value:
        raise AdapterError(
            f"{KEY} is the name of an adapter, or [name, scale, name, scale, ...], not {value!r}"
        )
    return wanted(dict(zip(value[::2], value[1::2], strict=True)))


class Failure(NamedTuple):
    """An error on its way between processes."""

    kind: str
    message: str
    rank: int

    def error(self, *, name_rank: bool = False) -> Exception:
        """Return the error, of its type if it was ours or about a file, else a `ServeError`."""
        where = f"rank {self.rank}: " if name_rank else ""
        kind = getattr(errors, self.kind, getattr(builtins, self.kind, None))
        if isinstance(kind, type) and issubclass(kind, _TOLD):
            return kind(f"{where}{self.message}")
        return ServeError(f"{where}{self.kind}: {self.message}")


_TOLD = (ShiraError, FileNotFoundError, IsADirectoryError, PermissionError)


class Processes:
    """The processes that hold parts of one model: here one alone; engines have others."""

    rank = 0
    """This one's number."""

    def gather(self, value: Any) -> list[Any]:
        """Return everyone's value, by rank; each process calls it in the same order."""
        return [value]


def agree(processes: Processes, step: Callable[[], T]) -> T:
    """Run a step in every process; return its result, or raise the first one's error in all."""
    result, failure, cause = None, None, None
    try:
        result = step()
    except Exception as error:
        failure, cause = Failure(type(error).__name__, str(error), processes.rank), error
    everyone = gather(processes, failure)
    if failures := [each for each in everyone if each is not None]:
        raise failures[0].error(name_rank=len(everyone) > 1) from cause
    return result  # type: ignore[return-value]  # the step went well


def gather(processes: Processes, value: Any) -> list[Any]:
    """Return everyone's value, by rank; `ServeError` if another process cannot be reached."""
    try:
        return processes.gather(value)
    except Exception as error:
        raise ServeError(f"another rank cannot be reached: {error}") from error


def checked(answers: Sequence[Any], method: str) -> list[dict[str, Any]]:
    """Return the answers, rank 0's first, if each went well; else raise the error it was there."""
    for answer in answers:
        if not isinstance(answer, Mapping) or "ok" not in answer:
            raise ServeError(f"{method}: a worker answered {answer!r}, which is no report")
        if answer["method"] != method:
            raise ServeError(
                f"{method}: a worker answered to {answer['method']}: vLLM's answers are out of "
                "step, as they are once a call has failed on some workers only. Restart the engine"
            )
        if not answer["ok"]:
            raise Failure(answer["error"], answer["message"], answer["rank"]).error()
    if len({answer["state"] for answer in answers}) != 1:
        states = {answer["rank"]: answer["active"] for answer in answers}
        raise ServeError(f"{method}: ranks are in different states: {states}. Restart the engine")
    return list(answers)


def wanted(weights: Weights, scale: float = 1.0) -> dict[str, float]:
    """Return what shall be active, as scale by name; `AdapterError` if it is nothing such."""
    if isinstance(weights, str):
        weights, scale = {weights: scale}, 1.0
    if scale != 1.0:
        raise AdapterError("scale= goes with a single name; a mapping has a scale for each")
    if weights is not None and not isinstance(weights, Mapping):
        raise AdapterError(f"weights are a name, a mapping or None, not {weights!r:.100}")
    return {named(name): checked_scale(name, value) for name, value in (weights or {}).items()}


def named(name: object) -> str:
    """Check an adapter's name, and return it."""
    if not isinstance(name, str) or not 0 < len(name) <= 1000 or not name.isprintable():
        raise AdapterError(
            "an adapter's name is a text that is not empty, of at most 1000 characters that can be "
            f"printed, not {name!r:.100}"
        )
    return name


def located(path: object) -> str:
    """Check the path of an adapter, and return it as text."""
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # a TypeError tells
        text.encode()
        if not text or "\0" in text:
            raise ValueError("empty, or with a NUL")
    except (TypeError, ValueError) as error:
        raise AdapterError(f"an adapter cannot lie at the path {path!r:.100}") from error
    return text


def slept(level: object) -> int:
    """Check a level of sleep, and return it; `ConfigError` if vLLM has none such."""
    if isinstance(level, bool) or level not in (0, 1, 2):
        raise ConfigError(f"vLLM sleeps at level 0, 1 or 2, not {level!r:.100}")
    return int(level)  # type: ignore[call-overload, no-any-return]


def state_of(terms: Iterable[tuple[str, float]]) -> str:
    """Return a hash of what adapters with these digests and scales make of the base."""
    named = [(digest, scale.hex()) for digest, scale in terms]
    return hashlib.blake2b(repr(named).encode(), digest_size=16).hexdigest() if named else "base"


def salted(prompt: Any, salt: str) -> dict[str, Any]:
    """Return a prompt of any of vLLM's forms with a salt; one of its own is kept beside it."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif not isinstance(prompt, Mapping):
        prompt = {"prompt_token_ids": list(prompt)}
    own = prompt.get("cache_salt")
    return {**prompt, "cache_salt": f"{salt}-{own}" if own else salt}
