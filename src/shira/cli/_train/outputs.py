# SPDX-License-Identifier: Apache-2.0
"""What a run writes beside the adapter: figures, options, class names, plot, model card."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira._version import __version__
from shira.cli._train.card import model_card
from shira.cli._train.options import TrainOptions
from shira.cli._train.plot import plot_losses
from shira.store.atomic import write_atomically

if TYPE_CHECKING:
    from shira.cli._train.data import Data
    from shira.cli._train.run import Result

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def write_outputs(
    output: Path, options: TrainOptions, data: Data, result: Result, config: Any
) -> None:
    """Write ``metrics.json``, ``train.yaml``, ``labels.json``, ``loss.png`` and ``README.md``."""
    import yaml

    found = versions()
    figures = {
        **asdict(result),
        "rows": {
            "train": len(data.train),
            "evaluation": 0 if data.evaluation is None else len(data.evaluation),
        },
        "versions": found,
        "platform": platform.platform(),
    }
    _write(output / "metrics.json", json.dumps(figures, indent=2))
    given = {name: value for name, value in asdict(options).items() if value is not None}
    once = ("resume", "overwrite")  # of this run, not of the job
    job = {name: value for name, value in given.items() if name not in once}
    _write(output / "train.yaml", yaml.safe_dump(job, sort_keys=False))
    if data.labels is not None:
        _write(output / "labels.json", json.dumps(list(data.labels), indent=2))
    plotted = plot_losses(result.history, output / "loss.png")
    card = model_card(options, data, result, config, versions=found, plot=plotted)
    _write(output / "README.md", card)


def versions() -> dict[str, str]:
    """Versions of everything that had a part in a run."""
    return {
        "shira": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _write(path: Path, text: str) -> None:
    write_atomically(path, f"{text.rstrip()}\n".encode())
