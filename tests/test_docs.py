# SPDX-License-Identifier: Apache-2.0
"""What the pages of docs/ show in Python runs, each page as one program.

Pages whose commands run too have tests of their own beside the code they describe.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "page",
    [
        "block-masks.md",
        "choose-a-mask.md",
        "concepts.md",
        "index.md",
        "training.md",
    ],
)
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
    assert "import" in code
    exec(compile(code, page, "exec"), {})


def test_the_table_of_backends_is_complete():
    from shira.ops.dispatch import BACKENDS

    listed = re.findall(r"^\| `(\w+)` \| .*PU", (DOCS / "training.md").read_text(), re.MULTILINE)
    assert listed == list(BACKENDS)
