# SPDX-License-Identifier: Apache-2.0
"""The wire between a trainer and the workers of an engine: k values out, one short answer back.

A gloo process group of its own (rank 0 the trainer, the workers after it), beside whatever groups
either side has. A message is the values and nothing else; what they are was agreed before. Every
worker answers with a status and a text, because the engines' own calls lose a worker's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shira.errors import ConfigError, ServeError

_c10d: Any = dist  # torch has no types for what is used here

_ANSWER = 1024  # bytes: a status, and the text of an error


def check_ends(port: int, size: int, timeout: float) -> None:
    """Check where and how long the two sides are to meet.

    Raises:
        ConfigError: If one of them is out of range; the timeout is finite.
    """
    if not (0 < port < 2**16 and 1 < size <= 2**16 and 0 < timeout < 2**31):
        raise ConfigError(
            "port and workers are 1 to 65535, the timeout is a number of seconds above 0, not "
            f"{port!r}, {size - 1!r} and {timeout!r}"
        )


class Wire:
    """One end of it.

    Args:
        address: Host of the trainer.
        port: Free there.
        rank: 0 for the trainer, 1, 2, ... for the workers.
        size: Workers and the trainer.
        timeout: Seconds after which a missing partner is an error.

    Raises:
        ConfigError: If port, size or timeout is out of range.
        ServeError: If not everybody came in time.
    """

    def __init__(
        self, address: str, port: int, rank: int, size: int, timeout: float = 120.0
    ) -> None:
        check_ends(port, size, timeout)
        self.rank, self.size = rank, size
        limit = timedelta(seconds=timeout)
        try:
            self._store = _c10d.TCPStore(
                address, port, size, is_master=rank == 0, timeout=limit, wait_for_workers=False
            )
            prefixed = _c10d.PrefixStore("shira", self._store)
            self._group = _c10d.ProcessGroupGloo(prefixed, rank, size, limit)
            self._meet()
        except Exception as error:
            raise ServeError(f"no wire between trainer and workers: {error}") from error

    def send(self, values: Tensor) -> None:
        """The trainer's values to every worker."""
        self._do(self._group.broadcast(values.contiguous(), 0))

    def receive(self, nnz: int, dtype: torch.dtype) -> Tensor:
        """On a worker: the trainer's ``(nnz,)`` values."""
        values = torch.empty(nnz, dtype=dtype)
        self._do(self._group.broadcast(values, 0))
        return values

    def answer(self, error: Exception | None) -> None:
        """On a worker: how it went."""
        text = f"{type(error).__name__}: {error}".encode()[: _ANSWER - 1] if error else b""
        padded = torch.zeros(_ANSWER, dtype=torch.uint8)
        padded[0] = 1 if error else 0
        padded[1 : 1 + len(text)] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)[
            : len(text)
        ]
        self._do(self._group.send([padded], 0, self.rank))

    def answers(self) -> Sequence[str | None]:
        """On the trainer: for each worker None, or the text of its error."""
        found: list[str | None] = []
        for worker in range(1, self.size):
            padded = torch.empty(_ANSWER, dtype=torch.uint8)
            self._do(self._group.recv([padded], worker, worker))
            text = bytes(padded[1:].tolist()).rstrip(b"\0").decode(errors="replace")
            found.append(text if int(padded[0]) else None)
        return found

    def _meet(self) -> None:
        self._do(self._group.barrier())

    def _do(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise ServeError(f"the wire between trainer and workers broke: {error}") from error
