# SPDX-License-Identifier: Apache-2.0
"""`shira report`: everything that can be seen of adapters, as one page.

``gather`` reads adapters and measures them; ``page`` fills ``page.html`` and draws its charts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shira.cli import options
from shira.cli.output import write
from shira.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from shira.checkpoints import Checkpoint

EXAMPLES = (
    "shira report adapter",
    "shira report adapter --base ./my-model -o adapter.html",
    "shira report poems code law -o three.html",
    "shira report poems code --fast",
)


def command(
    adapters: Annotated[
        list[Path], typer.Argument(help="The adapters: folders or files.", metavar="ADAPTER...")
    ],
    output: Annotated[Path, options.output("The page to write.")] = Path("report.html"),
    base: Annotated[
        str | None,
        options.base(
            "Tells how many deltas bfloat16 loses, and the shapes of weights where an adapter does "
            "not record them."
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Leave out ranks, AWOM and AWOR, which take the longer time."),
    ] = False,
    check_base: options.CheckSameBase = True,
    seed: options.Seed = 0,
) -> None:
    """Write one HTML page that shows adapters.

    In short what each is, how large, what it changes and whether it clashes with the others; then
    values, ranks, where in each weight the entries are, deltas that bfloat16 loses (with --base),
    and the training curve if metrics.json of shira train or trainer_state.json lies beside an
    adapter. The page holds all it needs: it opens without a network, on a phone or a desktop, light
    or dark.

    Exit status 2: an adapter cannot be read, or the adapters do not belong together.
    """
    from shira.checkpoints import open_checkpoint

    checkpoint = None if base is None else open_checkpoint(base)
    write_report(adapters, output, checkpoint, fast=fast, seed=seed, check_base=check_base)
    write(f"{output}: {len(adapters)} adapter{'s' if len(adapters) > 1 else ''}")


def write_report(
    paths: Sequence[Path],
    output: Path,
    base: Checkpoint | None = None,
    *,
    fast: bool = False,
    seed: int = 0,
    check_base: bool = True,
) -> None:
    """Write the page of some adapters; whatever goes wrong, an old page stays as it was.

    Options are those of the command. What can be refused before adapters are read is refused then.
    """
    from shira.cli.report.gather import LOGS, gather, log_folder
    from shira.store.atomic import check_kind, check_outputs, write_atomically

    logs = [log_folder(path) / name for path in paths for name in LOGS]
    check_outputs({"--output": output}, [*paths, *logs], [base.path if base else None])
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    check_kind(output)
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise MissingDependencyError(f"shira report needs {package}: pip install {package}")
    from shira.cli.report.page import page

    found = gather(paths, base, fast=fast, seed=seed, check_base=check_base)
    write_atomically(output, page(*found).encode())
