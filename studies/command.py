# SPDX-License-Identifier: Apache-2.0
"""What the command lines of the studies share: their options, and the report at the end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path


def parser(
    name: str, about: str | None, holds: str, *, more_actions: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The options of ``python -m studies.NAME``: what to do, the folder of data, jobs, minutes.

    Args:
        name: of the study.
        about: its help.
        holds: what the folder of data holds.
        more_actions: besides ``report``, ``run`` and ``plan``.
    """
    made = argparse.ArgumentParser(prog=f"python -m studies.{name}", description=about)
    actions = ("report", *more_actions, "run", "plan")
    made.add_argument("action", nargs="?", choices=actions, default="report")
    made.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("SHIRA_STUDY_DATA"),
        help=f"folder with {holds} (default: $SHIRA_STUDY_DATA)",
    )
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    made.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    return made


def report(rebuild: Callable[[], Sequence[str]]) -> int:
    """Rebuild a study's page and say what was written; the exit status."""
    for line in rebuild():
        print(line)
    return 0
