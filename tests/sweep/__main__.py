# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.sweep``: adapters on every model class of a library, against merged models."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = ("transformers", "diffusers", "timm")


def main() -> None:
    """Sweep, resuming what an earlier call left."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, default="transformers")
    parser.add_argument("--only", default="", help="a regular expression for names of classes")
    parser.add_argument("--verdict", default="", help="do again those of this verdict")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--results", type=Path, default=Path("build/sweep"))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=60, help="limit for one class")
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tests.sweep import one, table, workers

    if options.write:
        table.write(sorted(options.results.glob("*.jsonl")), lambda name: one.library(name).names())
        return
    models = one.library(options.library)
    file = options.results / f"{options.library}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    state = one.state(models.VERSION)
    done = {row["class"]: row for row in table.rows(file)}
    names = [name for name in models.names() if re.search(options.only, name)]
    if options.verdict:
        names = [name for name in names if done.get(name, {}).get("verdict") == options.verdict]
    elif not options.again:
        names = [name for name in names if done.get(name, {}).get("state") != state]
    names.sort(key=lambda name: not models.is_first(name))
    began = time.monotonic()
    work = one.Work(options.library)
    if len(names) > 10:
        work(names[0])  # what is made once is made before the forks
    with file.open("a") as stream:
        for name, found in workers.each(work, names, options.seconds, options.jobs):
            row = found if isinstance(found, dict) else one.ended(options.library, name, found)
            stream.write(json.dumps(row | {"state": state}) + "\n")
            stream.flush()
            print(f"{row['verdict']:9} {name} ({row['layers']}) {row['detail'][:300]}", flush=True)
    print(f"{len(names)} classes in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
