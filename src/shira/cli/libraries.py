# SPDX-License-Identifier: Apache-2.0
"""Set up the libraries underneath: no network, no bars and notes between a command's own lines."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def no_accelerator_note() -> None:
    """Keep DeepSpeed from saying, on standard output, that it found no accelerator.

    transformers imports DeepSpeed wherever it is installed, whether it is used or not. Call it
    before transformers is imported; DeepSpeed's other messages come through.
    """
    logging.getLogger("DeepSpeed").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def offline() -> None:
    """Let Hugging Face libraries ask no server; call it before they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"


def share_cores() -> None:
    """Let waiting threads sleep instead of spinning; call it before torch is imported.

    It costs nothing on an idle machine. Where other programs want the same cores, a training step
    that would otherwise stall many times over is slowed down by their share alone.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quieten(*, warnings_too: bool) -> None:
    """Turn off progress bars of other libraries where no person looks, and perhaps their notes.

    Args:
        warnings_too: also silence what they say below an error, and their deprecation warnings.
    """
    import huggingface_hub.utils
    from transformers.utils import logging

    if warnings_too or not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if warnings_too:
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
