# SPDX-License-Identifier: Apache-2.0
"""The entry point: help that is quick and plain, errors that are one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shira import __version__
from shira.cli.app import COMMANDS

HEAVY = {"torch", "numpy", "transformers", "peft", "datasets", "matplotlib"}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy_and_is_plain_ascii(arguments):
    out = run_python(
        "import sys\n"
        "from shira.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('MODULES', *sys.modules)"
    )
    text, _, modules = out.partition("MODULES")
    assert not HEAVY & set(modules.split())
    assert text.isascii()
    assert "\x1b" not in text
    assert "Examples:\n    shira " in text


def test_a_subcommand_imports_no_other(shira):
    out = run_python(
        "import sys\n"
        "from shira.cli import main\n"
        "try: main(['inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    loaded = set(out.partition("MODULES")[2].split())
    assert "shira.cli.inspect" in loaded
    assert not {"shira.cli.demo", "shira.cli.train"} & loaded


def test_help_lists_every_command(shira):
    answer = shira("--help")
    assert answer.status == 0
    for name in COMMANDS:
        assert f"\n  {name}" in answer.out


def test_version(shira):
    assert shira("--version").out == f"shira {__version__}\n"


def test_a_wrong_name_is_refused_with_a_near_one(shira):
    answer = shira("inspct")
    assert answer.status == 2
    assert answer.err.startswith("error: there is no command 'inspct'")
    assert answer.err.endswith("Did you mean 'inspect'?\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect"], "error: missing argument 'path'; see shira inspect --help\n"),
        (
            ["inspect", "x", "--nosuch"],
            "error: no such option: --nosuch; see shira inspect --help\n",
        ),
        (["merge", "x"], "error: missing option '--base'; see shira merge --help\n"),
        (["--nosuch"], "error: no such option: --nosuch; see shira --help\n"),
    ],
)
def test_a_wrong_option_is_one_line_like_any_error(shira, arguments, said):
    assert shira(*arguments) == (2, "", said)


def test_without_a_command_there_is_help(shira):
    answer = shira()
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("Usage: shira")


def test_the_status_of_a_command_is_that_of_the_process(shira, monkeypatch):
    import typer

    import shira.cli.summary as summary

    def done(path, base):
        raise typer.Exit(1)

    monkeypatch.setattr(summary, "summarize", done)
    assert shira("inspect", "x").status == 1


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "shira", "inspect", "/no/such/adapter"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: /no/such/adapter: no such file or folder\n"
    assert done.stdout == ""


def test_debug_shows_the_traceback():
    from shira.cli import main

    with pytest.raises(FileNotFoundError):
        main(["inspect", "/no/such/adapter", "--debug"])


def test_an_error_of_our_own_making_is_not_swallowed(monkeypatch):
    import shira.cli.summary as summary
    from shira.cli import main

    def broken(path, base):
        raise RuntimeError("a bug")

    monkeypatch.setattr(summary, "summarize", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", "x"])


def test_an_error_of_several_lines_becomes_one(shira, monkeypatch):
    import shira.cli.summary as summary
    from shira.errors import ShiraError

    def refuse(path, base):
        raise ShiraError("first\n  second")

    monkeypatch.setattr(summary, "summarize", refuse)
    assert shira("inspect", "x") == (2, "", "error: first second\n")
