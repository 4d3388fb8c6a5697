# SPDX-License-Identifier: Apache-2.0
"""A server of many lives, each as planned: ``fake_server.py FOLDER PLAN,PLAN,...``.

``serve`` is ready and ends when asked to, ``die`` is killed once it is ready, ``fail`` ends before,
``deaf`` is ready and ends for no signal. Each leaves a worker behind it, and the ids of both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(folder: Path, plans: list[str]) -> None:
    life = len(list(folder.glob("life-*")))
    plan = plans[min(life, len(plans) - 1)]
    if plan == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"life-{life}").write_text(f"{os.getpid()} {worker.pid}")
    if plan == "fail":
        sys.exit(3)
    Path(os.environ["SHIRA_READY"]).touch()
    if plan == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
