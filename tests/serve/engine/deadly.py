# SPDX-License-Identifier: Apache-2.0
"""A worker extension for tests: a worker that is killed half way through writing."""

from __future__ import annotations

import os
import signal

from shira.ops.patch import Exchange
from shira.serve.vllm import ShiraWorkerExtension


class DiesInSwitching(ShiraWorkerExtension):
    def shira_test_die_next(self, rank: int) -> None:
        write, count = Exchange.run, []

        def run(exchange):
            write(exchange)
            count.append(exchange)
            if self.rank == rank and len(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        Exchange.run = run
