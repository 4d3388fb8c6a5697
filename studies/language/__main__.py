# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.language``: rebuild tables and figure.

``base`` makes the base model, ``run`` makes missing runs (and the base before them), ``plan`` lists
them.
"""

from __future__ import annotations

from pathlib import Path

from studies import command
from studies.language import data as texts
from studies.language import store
from studies.language.plan import plan
from studies.language.protocol import SOURCE, TARGETS

FOLDER = Path(__file__).parents[2] / "build" / "study-language"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, and do it. 0 also where runs are missing: it says how many."""
    parser = command.parser(
        "language", __doc__, "lm/NAME/train.txt and test.txt", more_actions=["base"]
    )
    parser.add_argument("--base", type=Path, default=FOLDER, help="folder of the base model")
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, with commas between")
    arguments = parser.parse_args(argv)
    targets = arguments.targets.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"unknown targets: {', '.join(unknown)}; known are {', '.join(TARGETS)}")
    if arguments.action == "plan":
        missing = plan(store.load(), targets)
        for run in missing.runs:
            print(run.key, run.stage, run.target, run.method, run.rate, run.seed)
        print(f"and {missing.unknown_finals} final runs whose rate is not known yet")
        return 0
    if arguments.action in ("base", "run"):
        reasons = {name: texts.absent(arguments.data, name) for name in (SOURCE, *targets)}
        for name, reason in reasons.items():
            if reason:
                print(f"skipped: {name}: {reason}")
        if reasons[SOURCE] is None:
            from studies.language.runner import continue_runs, ensure_base

            made = ensure_base(arguments.data.resolve(), arguments.base.resolve())
            if arguments.action == "run":
                here = [target for target in targets if reasons[target] is None]
                count = continue_runs(
                    arguments.data.resolve(),
                    made,
                    here,
                    jobs=arguments.jobs,
                    minutes=arguments.minutes,
                )
                print(f"{count} runs made")
    from studies.language.document import rebuild

    return command.report(rebuild)


if __name__ == "__main__":
    raise SystemExit(main())
