# SPDX-License-Identifier: Apache-2.0
"""`shira serve`: vLLM's server with adapters, started again when it died."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira serve ./llama --adapters ./adapters",
    "shira serve ./llama --adapters ./adapters --journal ./served.json",
    "shira serve ./llama --adapters ./adapters --port 8001 --tensor-parallel-size 2",
    "shira serve ./llama --adapters ./adapters --max-restarts 0",
)
CONTEXT = {
    "ignore_unknown_options": True,  # they are vLLM's
    "help_option_names": ["--help"],  # -dph is one of vLLM's
}


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="The model, and any options of 'vllm serve'.", metavar="MODEL [VLLM OPTION]"
        ),
    ],
    adapters: Annotated[
        Path | None,
        typer.Option(
            envvar="SHIRA_ADAPTERS",
            show_envvar=False,
            help="The folder of adapters; $SHIRA_ADAPTERS if not given.",
        ),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            envvar="SHIRA_JOURNAL",
            show_envvar=False,
            help="The file that keeps which adapters are loaded and active, also for the next time "
            "this command is run; $SHIRA_JOURNAL, or a temporary file, if not given.",
        ),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often the server is started again within the window.")
    ] = 5,
    restart_window: Annotated[float, typer.Option(min=0, help="The window, in seconds.")] = 3600.0,
    stop_timeout: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that the server has to end when asked to; then it is killed."
        ),
    ] = 30.0,
) -> None:
    """Run 'vllm serve' with shira's worker extension and routes, and keep it running.

    vLLM ends its server when one of its workers dies. Here it is started again, after a second
    and then after ever longer pauses, and has its adapters again before it takes requests.
    A server that ends before it was ready for the first time is not started again. SIGTERM and
    SIGINT end the server and this command; a second one kills it.

    Exit status 0: ended by a signal. 1: it died too often. Otherwise that of a server that was
    never ready; 2: the command is invalid.
    """
    import os
    import tempfile

    from shira.cli._serve import child
    from shira.serve.supervisor import Restarts, Supervisor

    adapters, journal = (path and path.expanduser() for path in (adapters, journal))
    child.check(arguments, adapters, journal)
    with tempfile.TemporaryDirectory(prefix="shira-serve-") as folder:
        kept = journal or Path(folder, "journal.json")
        ready = Path(folder, "ready")
        supervisor = Supervisor(
            child.command(arguments),
            env=child.environment(os.environ, adapters=adapters, journal=kept, ready=ready),
            ready=ready,
            restarts=Restarts(max_restarts, restart_window),
            grace=stop_timeout,
            say=child.say,
        )
        status = supervisor.run()
    raise typer.Exit(status)
