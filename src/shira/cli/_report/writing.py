# SPDX-License-Identifier: Apache-2.0
"""From paths of adapters to a page on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shira.checkpoints import Checkpoint
from shira.cli._report.curve import LOGS, log_folder
from shira.cli._report.gather import gather
from shira.cli._report.page import page
from shira.errors import ConfigError
from shira.store.atomic import check_outputs, write_atomically


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

    Args:
        paths: The adapters; these and the rest are as for `gather`.
        output: The file.
        base: The base model's checkpoint.
        fast: Leave out ranks, AWOM and AWOR.
        seed: Of estimates that draw.
        check_base: Refuse adapters of different base models.

    Raises:
        ConfigError: If the folder of ``output`` does not exist, or ``output`` is an input; and what
            `gather` raises.
    """
    logs = [log_folder(path) / name for path in paths for name, _ in LOGS]
    check_outputs({"--output": output}, [*paths, *logs], [base.path if base else None])
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; name a file in it")
    text = page(gather(paths, base, fast=fast, seed=seed, check_base=check_base))
    # a name can hold half of a surrogate pair, which UTF-8 has not
    write_atomically(output, text.encode("utf-8", "replace"))
