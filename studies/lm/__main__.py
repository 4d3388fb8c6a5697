# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.lm``: rebuild tables and figures.

``look``, ``tune`` and ``run`` make missing runs: those to begin with, all of tuning, everything.
``plan`` lists them, ``base`` converts the base, ``pack`` makes the two folders of ``--parts`` that
a machine without a network needs.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from shira.errors import MissingDependencyError
from studies import command
from studies.lm import base as bases
from studies.lm import data as texts
from studies.lm.plan import plan
from studies.lm.protocol import DEVICES, SOURCE, TARGETS, Arm, Run, arm_of
from studies.lm.runs import STUDY, Done, described, load

STAGES = ("look", "tune", "run")
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, and do it. 0 also where runs are missing: it says how many."""
    parser = command.parser(
        "lm", __doc__, "lm/NAME and commonsense/NAME", more_actions=["look", "tune", "base", "pack"]
    )
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: the device's")
    parser.add_argument("--base", type=Path, help="folder of the base model (default: the demo's)")
    parser.add_argument("--parts", type=Path, help="folder that pack made; the base comes from it")
    parser.add_argument("--together", type=int, default=1, help="runs at a time in a process")
    parser.add_argument("--results", type=Path, default=STUDY.results, help="folder of the runs")
    arguments = parser.parse_args(argv)
    arm = arm_of(arguments.device, DTYPES.get(arguments.dtype))
    if arguments.action == "plan":
        missing = plan(load(arguments.results), arm)
        for run in missing.runs:
            print(run.key, described(run))
        print(f"and {missing.unknown_finals} final runs that are not known yet")
        return 0
    if arguments.action == "pack":
        if arguments.parts is None or arguments.data is None:
            parser.error("pack needs --parts FOLDER and --data FOLDER")
        for folder in bases.pack(Path(arguments.data), arguments.parts):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            print(f"{folder}: {size / 1e6:.0f} MB")
        return 0
    if arguments.action == "base":
        print(bases.ensure(arguments.base, arguments.parts))
        return 0
    if arguments.action in STAGES:
        print(f"{_make_missing(arguments, arm)} runs made")
    from studies.lm.document import rebuild

    if arguments.results != STUDY.results:  # the page is made of the committed runs alone
        return 0
    return command.report(rebuild)


def _make_missing(arguments: Namespace, arm: Arm) -> int:
    here = [name for name in TARGETS if _usable(arguments.data, name)]
    if not here or not _usable(arguments.data, SOURCE):
        return 0
    try:
        base = bases.ensure(arguments.base, arguments.parts)
    except MissingDependencyError as error:
        print(f"skipped: {error}")
        return 0

    def missing(done: Done) -> list[Run]:
        left = plan(done, arm)
        by_stage = {"look": left.look, "tune": left.tuning, "run": left.runs}
        return [run for run in by_stage[arguments.action] if run.target in here]

    return STUDY.continue_runs(
        missing,
        Path(arguments.data).resolve(),
        jobs=arguments.jobs,
        minutes=arguments.minutes,
        folder=arguments.results,
        together=arguments.together,
        base_folder=base.resolve(),
    )


def _usable(data: Path | None, name: str) -> bool:
    if reason := texts.absent(None if data is None else Path(data), name):
        print(f"skipped: {name}: {reason}")
    return reason is None


if __name__ == "__main__":
    raise SystemExit(main())
