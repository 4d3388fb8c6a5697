# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README.md and docs/."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def fences(page: Path) -> list[tuple[str, str]]:
    """What stands after the opening ``` of each block, and the block's text."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(head, text) for head, text in found]


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of one language; at least one."""
    found = [text for head, text in fences(page) if head == language]
    assert found, f"{page.name} has no {language}"
    return found


def commands(page: Path) -> list[str]:
    """The lines of the ``sh`` blocks, without what follows a ``#``."""
    lines = "".join(blocks(page, "sh")).splitlines()
    return [found for line in lines if (found := line.partition(" #")[0].strip())]
