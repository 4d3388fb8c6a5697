# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks [SUITE] [options]``: run one suite, or all of them with their defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from benchmarks import (
    chain,
    files,
    fusing,
    gpu,
    gpu_adapters,
    growth,
    kernel,
    masks,
    merging,
    mixed_batch,
    policy,
    report,
    serving,
    switching,
    training,
)

SUITES: dict[str, Any] = {
    suite.NAME: suite
    for suite in (
        training,
        kernel,
        growth,
        masks,
        mixed_batch,
        switching,
        merging,
        fusing,
        files,
        chain,
        serving,
        policy,
        gpu,
        gpu_adapters,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    chosen, output = options.pop("suite"), options.pop("output", None)
    failed = False
    for name in [chosen] if chosen else SUITES:
        suite = SUITES[name]
        why = suite.unavailable() if hasattr(suite, "unavailable") else None
        if why:
            print(f"{name}: not measured: {why}\n")
            if chosen:
                return 1
            continue
        path = output or report.RESULTS / f"{name}.json"
        # A suite of parts is written after each: one that fails later loses nothing.
        parts = getattr(suite, "parts", lambda *given: [suite.run(*given)])  # noqa: B023
        for result in parts(suite.Settings(**options), report.say):
            report.write(result, path)
        report.say("")
        failed |= bool(result.get("failed"))
        for table in suite.tables(result):
            table.print()
        print(f"written to {path}\n")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=sys.modules["benchmarks"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = parser.add_subparsers(
        dest="suite", metavar="SUITE", help="one suite; all when left out"
    )
    for name, suite in SUITES.items():
        summary = (suite.__doc__ or "").partition("\n\n")[0]
        sub = suites.add_parser(
            name,
            help=summary,
            description=suite.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for option in fields(suite.Settings):
            _add(sub, option)
        sub.add_argument(
            "--output", type=Path, help=f"the JSON file (default: {report.RESULTS / name}.json)"
        )
    return parser


def _add(parser: argparse.ArgumentParser, option: Any) -> None:
    """One command-line option for one field of a suite's Settings."""
    if option.default is MISSING:
        raise TypeError(f"the setting {option.name} needs a default")
    kind: dict[str, Any] = {"type": type(option.default)}
    if isinstance(option.default, bool):
        kind = {"action": argparse.BooleanOptionalAction}
    parser.add_argument(
        f"--{option.name.replace('_', '-')}",
        default=option.default,
        help=f"{option.metadata['help']} (default: {option.default})",
        **kind,
    )


if __name__ == "__main__":
    sys.exit(main())
