# SPDX-License-Identifier: Apache-2.0
"""Pages of the site that are in no file: the benchmarks with their pictures, the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    sys.path.insert(0, str(ROOT))  # benchmarks are not installed
    from benchmarks import page

    made = {**page.files(), "command-line.md": command_line()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def command_line() -> str:
    """Every command with its arguments, options and examples, as ``--help`` has them."""
    import typer.main

    from shira.cli.app import COMMANDS, build_app

    group: Any = typer.main.get_command(build_app(COMMANDS))
    lines = ["# Command line", "", "`shira COMMAND --help` shows the same."]
    for name, command in group.commands.items():
        lines += ["", f"## shira {name}", "", (command.help or "").replace("\b", "").strip(), ""]
        lines += ["| argument or option | |", "|---|---|"]
        for parameter in command.params:
            names = [*parameter.opts, *parameter.secondary_opts]
            if parameter.param_type_name == "argument":
                names = [(parameter.metavar or parameter.name).upper()]
            shown = ", ".join(f"`{name}`" for name in names)
            about = (parameter.help or "").replace("|", "&#124;")
            if parameter.default not in (None, False) and "default" not in about:
                about += f" (default {parameter.default})"
            lines.append(f"| {shown} | {about} |")
        lines += ["", "```text", *importlib.import_module(COMMANDS[name]).EXAMPLES, "```"]
    return "\n".join(lines) + "\n"
