# SPDX-License-Identifier: Apache-2.0
"""What docs/switching.md shows runs, block after block, as one program."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "switching.md"


def test_python_blocks(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    namespace: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "{'code': 1.0, 'poems': 0.5}" in printed
    assert "somebody else has written to the weight since" in printed
