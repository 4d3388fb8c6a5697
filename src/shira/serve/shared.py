# SPDX-License-Identifier: Apache-2.0
"""What all clients of one engine share: the lock, the gate, what is active.

Two switches of one engine must not interleave, and a request salted through one client must not
meet a switch made through another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from shira.errors import ConfigError
from shira.serve.gate import Gate
from shira.serve.journal import Kept, Record
from shira.serve.reports import Reports

Weights: TypeAlias = "str | Mapping[str, float] | None"
"""What shall be active: a name, ``{name: scale, ...}``, or None for the base."""

Cache: TypeAlias = Literal["reset", "salt"]
"""What becomes of the prefix cache at a switch."""

NO_RESET = (
    "vLLM did not drop its prefix cache (blocks are in use), so old weights would have answered "
    "for new ones; the switch was taken back"
)


@dataclass
class Shared:
    """One engine's state on this side.

    Attributes:
        lock: Held while anything is changed.
        gate: Requests share it, a switch is alone.
        discarded: Whether the engine sleeps without its weights.
        reports: What the workers last said.
        kept: What was loaded through the clients, by name.
    """

    lock: Any
    gate: Gate = field(default_factory=Gate)
    discarded: bool = False
    reports: Reports = field(default_factory=lambda: Reports([{"active": {}, "state": "base"}]))
    kept: dict[str, Kept] = field(default_factory=dict)

    def record(self) -> Record:
        """What the engine holds, or held when it was lost."""
        return Record(dict(self.kept), {}, dict(self.reports.active))


_ENGINES: weakref.WeakKeyDictionary[Any, Shared] = weakref.WeakKeyDictionary()


def shared_of(engine: Any, lock: Callable[[], Any]) -> Shared:
    """The state of an engine; made with a new lock for the first client."""
    if engine not in _ENGINES:
        _ENGINES[engine] = Shared(lock())
    return _ENGINES[engine]


def policy(cache: str) -> Cache:
    """A cache policy, checked.

    Raises:
        ConfigError: If there is no such policy.
    """
    if cache not in ("reset", "salt"):
        raise ConfigError(f"cache is 'reset' or 'salt', not {cache!r}")
    return cache  # type: ignore[return-value]  # one of the two
