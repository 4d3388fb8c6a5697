# SPDX-License-Identifier: Apache-2.0
"""The table of subcommands, and the typer application made of them.

A subcommand is a module with a function `command`, whose signature and docstring are its options
and its help, and `EXAMPLES`, lines to try that are shown below the help; `CONTEXT`, where there is
one, is how its options are parsed. Only the module that is called is imported; all are for
``shira --help``, and so none may import torch at its head.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import typer

from shira._version import __version__
from shira.errors import ConfigError, did_you_mean

COMMANDS = {
    "demo": "shira.cli.demo",
    "train": "shira.cli.train",
    "inspect": "shira.cli.inspect",
    "report": "shira.cli.report",
    "fuse": "shira.cli.fuse",
    "overlap": "shira.cli.overlap",
    "merge": "shira.cli.merge",
    "unmerge": "shira.cli.unmerge",
    "extract": "shira.cli.extract",
    "convert": "shira.cli.convert",
    "diff": "shira.cli.diff",
    "apply": "shira.cli.apply",
    "verify": "shira.cli.verify",
    "switch-bench": "shira.cli.switch_bench",
    "serve": "shira.cli.serve",
}
"""Subcommands in the order in which ``shira --help`` lists them, and their modules."""

ABOUT = "Sparse High Rank Adapters: train, look at, switch and restore them, exactly."
EXAMPLES = (
    "shira demo",
    "shira train --model MODEL --task text-classification --train-file train.csv --output adapter",
    "shira inspect adapter",
    "shira merge adapter --base ./model --output ./merged",
    "shira COMMAND --help",
)

# click's, or in later releases typer's own copy of it; no name of typer's leads there directly
_UsageError: Any = typer.BadParameter.__base__


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, run the subcommand they name, and exit; refuse what there is not."""
    named = next((a for a in arguments if not a.startswith("-")), None)
    if named is not None and named not in COMMANDS:
        raise ConfigError(
            f"there is no command {named!r}; there are {', '.join(COMMANDS)}."
            f"{did_you_mean(named, COMMANDS)}"
        )
    app = build_app(COMMANDS if named is None else [named])
    try:
        status = app(args=list(arguments), prog_name="shira", standalone_mode=False)
    except _UsageError as error:
        if not arguments:  # "no arguments" is an error whose message is the help
            error.show(sys.stderr)
            sys.exit(error.exit_code)
        message = error.format_message().rstrip(".")
        help = " ".join(filter(None, ("shira", named, "--help")))
        raise ConfigError(f"{message[:1].lower()}{message[1:]}; see {help}") from error
    except typer.Abort:
        status = 130  # ctrl-C, or the end of the input
    sys.exit(status if isinstance(status, int) else 0)


def build_app(names: Iterable[str]) -> typer.Typer:
    """Return the application with these subcommands; help is plain unless a person reads it."""
    markup: Literal["rich"] | None = "rich" if sys.stdout.isatty() else None
    app = typer.Typer(
        help=ABOUT,
        epilog=_epilog(EXAMPLES, markup),
        rich_markup_mode=markup,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_global_options)
    for name in names:
        module = importlib.import_module(COMMANDS[name])
        app.command(
            name,
            epilog=_epilog(module.EXAMPLES, markup),
            context_settings=getattr(module, "CONTEXT", None),
        )(module.command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shira {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[  # taken out of the arguments by `main`; declared here to be in the help
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")
    ] = False,
) -> None:
    """Declare what may stand before the subcommand."""


def _epilog(examples: Sequence[str], markup: str | None) -> str:
    """Return the examples, each on its line; typer's two styles of help reflow text unlike."""
    if markup is None:
        return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
    return "\n\n".join(["Examples:", *(line.replace("[", r"\[") for line in examples)])
