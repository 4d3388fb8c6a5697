# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.accuracy``: rebuild tables and figures; with ``run``, after missing runs."""

from __future__ import annotations

from studies import command
from studies.accuracy import data as rows
from studies.accuracy.plan import plan
from studies.accuracy.protocol import TASKS
from studies.accuracy.runs import STUDY


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, and do it. 0 also where runs are missing: it says how many."""
    parser = command.parser("accuracy", __doc__, "a folder of rows for each task")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, with commas between")
    arguments = parser.parse_args(argv)
    tasks = arguments.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"unknown tasks: {', '.join(unknown)}; known are {', '.join(TASKS)}")
    if arguments.action == "plan":
        missing = plan(STUDY.load(), tasks)
        for run in missing.runs:
            print(run.key, run.stage, run.task, run.method, run.size or "-", run.rate, run.seed)
        print(f"and {missing.unknown_finals} final runs whose rate is not known yet")
        return 0
    if arguments.action == "run":
        reasons = {task: rows.absent(arguments.data, task) for task in tasks}
        for task, reason in reasons.items():
            if reason:
                print(f"skipped: {task}: {reason}")
        here = [task for task in tasks if reasons[task] is None]
        made = 0
        if here:
            made = STUDY.continue_runs(
                lambda done: plan(done, here).runs,
                arguments.data.resolve(),
                jobs=arguments.jobs,
                minutes=arguments.minutes,
            )
        print(f"{made} runs made")
    from studies.accuracy.document import rebuild

    return command.report(rebuild)


if __name__ == "__main__":
    raise SystemExit(main())
