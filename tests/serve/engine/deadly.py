# SPDX-License-Identifier: Apache-2.0
"""A worker extension for tests: a worker that is killed half way through writing."""

from __future__ import annotations

import os
import signal

from shira.serve import exchange
from shira.serve.vllm import ShiraWorkerExtension


class DiesInSwitching(ShiraWorkerExtension):
    def shira_test_die_next(self, rank: int) -> None:
        write, count = exchange.Change.apply, []

        def apply(change):
            write(change)
            count.append(change)
            if self.rank == rank and len(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        exchange.Change.apply = apply
