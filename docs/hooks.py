# SPDX-License-Identifier: Apache-2.0
"""What the site has that is in no file: the page of the benchmarks and its pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    sys.path.insert(0, str(ROOT))  # benchmarks are not installed
    from benchmarks import page

    for name, content in page.files().items():
        files.append(File.generated(config, name, content=content))
    return files
