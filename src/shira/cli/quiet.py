# SPDX-License-Identifier: Apache-2.0
"""Keep the libraries underneath from writing bars and notes between a command's own lines."""

from __future__ import annotations

import os
import sys
import warnings


def offline() -> None:
    """Let Hugging Face libraries ask no server; call it before they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"


def quiet(*, warnings_too: bool) -> None:
    """No progress bars of other libraries where no person looks, and with `warnings_too` no notes.

    Args:
        warnings_too: also silence what they say below an error, and their deprecation warnings.
    """
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    if warnings_too or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        disable_progress_bars()
    if warnings_too:
        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
