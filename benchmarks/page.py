# SPDX-License-Identifier: Apache-2.0
"""All results as one Markdown page with pictures: ``python -m benchmarks.report``.

The page says what was measured, when, on what, and shows each suite's tables and its picture. It is
made anew from ``benchmarks/results/*.json``; no figure stands in it but those of the files. A suite
without a file is there and called not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, report
from benchmarks.__main__ import SUITES
from benchmarks.panels import PANELS

PAGE = "benchmarks.md"
PICTURES = "benchmarks"
INTRODUCTION = """\
# Benchmarks

Made from the files in `benchmarks/results/`, which `make bench` writes: nothing here is typed in.
Answers are compared before anything is timed, contenders take turns in one run, and bars show
medians with quartiles. The floor is the frozen model's own forward and backward pass.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="folder of the JSON files"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/report"), help="folder to write (%(default)s)"
    )
    options = parser.parse_args(arguments)
    for name, content in files(options.results).items():
        path = options.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    print(f"written to {options.output / PAGE}")
    return 0


def files(results: Path = report.RESULTS) -> dict[str, bytes]:
    """The page and its pictures, by their path relative to the page's folder."""
    made: dict[str, bytes] = {}
    sections = [INTRODUCTION]
    for name, suite in SUITES.items():
        path = results / f"{name}.json"
        sections.append(f"## {name}\n\n{_about(suite)}. `python -m benchmarks {name}`.\n")
        if not path.exists():
            sections.append("Not measured.\n")
            continue
        result = json.loads(path.read_text())
        picture = f"{PICTURES}/{name}.svg"
        made[picture] = figures.draw(PANELS[name](result))
        sections.append(_where(result))
        sections.append(f"![{name}: {_about(suite)}]({picture})\n")
        for table in suite.tables(result):
            sections.append(f"### {table.title}\n\n{table.markdown()}")
    made[PAGE] = "\n".join(sections).encode()
    return made


def _about(suite: Any) -> str:
    """What a suite measures, from the first line of its docstring: after "Suite ``name``: "."""
    text = " ".join((suite.__doc__ or "").partition("\n\n")[0].split())
    about = text.rpartition("``: ")[2].rstrip(".").replace("``", "`")
    return about[:1].upper() + about[1:]


def _where(result: dict[str, Any]) -> str:
    about = result["environment"]
    versions = ", ".join(
        f"{name} {version}" for name, version in about["versions"].items() if version
    )
    device = f", {about['cuda_device']}" if about["cuda_device"] else ""
    return (
        f"{result['date'][:10]}, {about['cpu']}, {about['cores']} cores{device}, "
        f"{about['system']}; {versions}.\n"
    )
