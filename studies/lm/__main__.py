# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.lm``: rebuild tables and figures.

``look``, ``tune`` and ``run`` make missing runs: those to begin with, all of tuning, everything.
``plan`` lists them, ``base`` converts the base, ``pack`` makes the two folders of ``--parts`` that
a machine without a network needs.
"""

from __future__ import annotations

from pathlib import Path

from studies import command
from studies.lm import base as bases
from studies.lm import data as texts
from studies.lm.plan import Plan, plan
from studies.lm.protocol import DEVICES, SOURCE, TARGETS, Run, arm_of
from studies.lm.runs import RESULTS, Done, continue_runs, described, load

STAGES = ("look", "tune", "run")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, and do it. 0 also where runs are missing: it says how many."""
    parser = command.parser(
        "lm", __doc__, "lm/NAME and commonsense/NAME", more_actions=["look", "tune", "base", "pack"]
    )
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the device's")
    parser.add_argument("--base", type=Path, default=bases.CACHE, help="folder of the base model")
    parser.add_argument("--parts", type=Path, help="folder that pack made; the base comes from it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    arguments = parser.parse_args(argv)
    arm = arm_of(arguments.device, arguments.dtype)
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
        here = [name for name in TARGETS if _usable(arguments.data, name)]
        made = 0
        if _usable(arguments.data, SOURCE) and here:

            def missing_here(done: Done) -> list[Run]:
                return [r for r in _of_stage(plan(done, arm), arguments.action) if r.target in here]

            made = continue_runs(
                missing_here,
                Path(arguments.data).resolve(),
                bases.ensure(arguments.base, arguments.parts).resolve(),
                jobs=arguments.jobs,
                minutes=arguments.minutes,
                folder=arguments.results,
            )
        print(f"{made} runs made")
    from studies.lm.document import rebuild

    if arguments.results != RESULTS:  # the page is made of the committed runs alone
        return 0
    return command.report(rebuild)


def _of_stage(left: Plan, stage: str) -> list[Run]:
    return {"look": left.look, "tune": left.look + left.tuning, "run": left.runs}[stage]


def _usable(data: Path | None, name: str) -> bool:
    if reason := texts.absent(None if data is None else Path(data), name):
        print(f"skipped: {name}: {reason}")
    return reason is None


if __name__ == "__main__":
    raise SystemExit(main())
