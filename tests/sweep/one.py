# SPDX-License-Identifier: Apache-2.0
"""One model class: built, and checked with its linear layers and with its other layers."""

from __future__ import annotations

import copy
import importlib
import logging
import subprocess
import time
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tests.sweep import checking
from tests.sweep.building import NotBuilt

ORDER = ("right", "refused", "not built", "WRONG")


def library(name: str) -> Any:
    """Return the module that names and builds the models of a library."""
    return importlib.import_module(f"tests.sweep.{name}_models")


class Work(NamedTuple):
    """Checks classes of a library; may be sent to another process."""

    library: str

    def __call__(self, name: str) -> dict[str, Any]:
        """Check one class; the row of the table, and the processor time it took."""
        began = time.process_time()
        row = self._row_of(name)
        return row | {"seconds": round(time.process_time() - began, 2)}

    def _row_of(self, name: str) -> dict[str, Any]:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        torch.set_num_threads(1)
        try:
            model, run, linear = library(self.library).build(name)
            lively = checking.steady(copy.deepcopy(model))
            before = checking.Reference(lively, run)
            if before.why:
                before = checking.Reference(checking.steady(model, lively=False), run)
            model = before.model
        except NotBuilt as error:
            return _row(self.library, name, "not built", 0, str(error))
        except Exception as error:
            return _row(self.library, name, "not built", 0, f"{type(error).__name__}: {error}")
        if before.why:
            return _row(self.library, name, "not built", 0, f"inputs: {before.why}")
        verdict, layers, details = "right", 0, []
        others = other_layers(model) if library(self.library).is_first(name) else []
        for what, targets in (("linear", linear), ("others", others)):
            if not targets:
                continue
            found = checking.check(copy.deepcopy(model), before, targets)
            if "modules set() not found" in found.detail:
                continue  # there is no linear layer
            layers += found.layers
            if ORDER.index(found.verdict) > ORDER.index(verdict):
                verdict = found.verdict
            if found.detail:
                details.append(f"[{what}: {found.verdict}] {found.detail}")
        if not layers and verdict == "right":
            return _row(self.library, name, "not built", 0, "it has no layer that can be adapted")
        return _row(self.library, name, verdict, layers, " ".join(details))


def other_layers(model: nn.Module) -> list[str]:
    """Return the names of embeddings and convolutions whose weight is theirs alone."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, _ConvNd))
        and name
        and owners.get(id(module._parameters.get("weight")), 1) == 1
    ]


def ended(library_name: str, name: str, how: str) -> dict[str, Any]:
    """Return the row of a class whose process did not answer."""
    return _row(library_name, name, "not built", 0, f"process: {how}")


def state(version: str) -> str:
    """Return what results depend on: the library's version and the sources of shira."""
    command = ["git", "rev-parse", "--short", "HEAD:src/shira"]
    sources = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{version} {sources}"


def _row(library_name: str, name: str, verdict: str, layers: int, detail: str) -> dict[str, Any]:
    return {
        "library": f"{library_name} {library(library_name).VERSION}",
        "class": name,
        "verdict": verdict,
        "layers": layers,
        "detail": " ".join(detail.split()),
    }
