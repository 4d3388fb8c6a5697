# SPDX-License-Identifier: Apache-2.0
"""Messages between clients and the workers of an engine: plain values, no engine.

`named`, `located`, `wanted` and `slept` check what a client asks before it is sent. Each rank
answers with a dict (see ``shira.serve.vllm``). `checked` turns failures into the errors they were
and insists that all ranks are in the same state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shira.delta import checked_scale
from shira.errors import AdapterError, ConfigError, ServeError
from shira.serve.processes import Failure


class Reports(NamedTuple):
    """The answers of all ranks, each of them well."""

    each: Sequence[dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """Rank 0's answer."""
        return self.each[0]

    @property
    def active(self) -> Mapping[str, float]:
        """Scale by name of what is active."""
        return self.first["active"]  # type: ignore[no-any-return]

    @property
    def salt(self) -> str:
        """A ``cache_salt`` for the state: equal exactly if equal states compute equal answers."""
        return f"shira-{self.first['state']}"


def checked(answers: Sequence[Any], method: str) -> Reports:
    """The answers, if each rank's went well.

    Raises:
        ShiraError: What the ranks refused, as the error it was there.
        ServeError: If ranks are not in the same state.
    """
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
    return Reports(list(answers))


def wanted(weights: str | Mapping[str, float] | None, scale: float = 1.0) -> dict[str, float]:
    """What shall be active, as scale by name.

    Raises:
        AdapterError: If it is of another type, a name is none, a scale is not a finite number, or a
            scale is given beside a mapping.
    """
    if isinstance(weights, str):
        weights, scale = {weights: scale}, 1.0
    if scale != 1.0:
        raise AdapterError("scale= goes with a single name; a mapping has a scale for each")
    if weights is not None and not isinstance(weights, Mapping):
        raise AdapterError(f"weights are a name, a mapping or None, not {weights!r:.100}")
    return {named(name): checked_scale(name, value) for name, value in (weights or {}).items()}


def named(name: object) -> str:
    """Check an adapter's name, and return it.

    Raises:
        AdapterError: If it is not 1 to 1000 characters of text that can be printed.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 1000 or not name.isprintable():
        raise AdapterError(
            "an adapter's name is a text that is not empty, of at most 1000 characters that can be "
            f"printed, not {name!r:.100}"
        )
    return name


def located(path: object) -> str:
    """Check the path of an adapter, and return it as text.

    Raises:
        AdapterError: If no file can have it.
    """
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # a TypeError tells
        text.encode()
        if not text or "\0" in text:
            raise ValueError("empty, or with a NUL")
    except (TypeError, ValueError) as error:
        raise AdapterError(f"an adapter cannot lie at the path {path!r:.100}") from error
    return text


def slept(level: object) -> int:
    """Check a level of sleep, and return it.

    Raises:
        ConfigError: If vLLM has no such level.
    """
    if isinstance(level, bool) or level not in (0, 1, 2):
        raise ConfigError(f"vLLM sleeps at level 0, 1 or 2, not {level!r:.100}")
    return int(level)  # type: ignore[call-overload, no-any-return]


def salted(prompt: Any, salt: str) -> dict[str, Any]:
    """A prompt of any of vLLM's forms with the salt; a salt of its own is kept beside it."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif not isinstance(prompt, Mapping):
        prompt = {"prompt_token_ids": list(prompt)}
    own = prompt.get("cache_salt")
    return {**prompt, "cache_salt": f"{salt}-{own}" if own else salt}
