# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.fusion``: rebuild the tables; with ``run``, after missing runs."""

from __future__ import annotations

from studies import command
from studies.accuracy import data as rows
from studies.fusion import runs
from studies.fusion.protocol import TASKS


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, and do it. 0 also where runs are missing: it says how many."""
    parser = command.parser("fusion", __doc__, "a folder of rows for each task")
    arguments = parser.parse_args(argv)
    if arguments.action == "plan":
        for run in runs.missing(runs.STUDY.load()):
            print(run.key, run.family, run.rate_exponent, run.seed)
        return 0
    if arguments.action == "run":
        reasons = [reason for task in TASKS if (reason := rows.absent(arguments.data, task))]
        for reason in reasons:
            print(f"skipped: {reason}")
        if not reasons:
            made = runs.STUDY.continue_runs(
                runs.missing,
                arguments.data.resolve(),
                jobs=arguments.jobs,
                minutes=arguments.minutes,
            )
            print(f"{made} runs made")
    from studies.fusion.document import rebuild

    return command.report(rebuild)


if __name__ == "__main__":
    raise SystemExit(main())
