# SPDX-License-Identifier: Apache-2.0
"""A page in a real browser: what its console says, and what a script finds in the page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=5000"),
)
# The page runs in a frame of the width asked for, so that the script around it can look inside.
AROUND = """<!doctype html><meta charset="utf-8">
<iframe id="frame" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("frame").onload = async (event) => {{
  const view = event.target.contentWindow, page = view.document;
  let found;
  try {{ found = await (async () => {{ {script} }})(); }} catch (error) {{ found = String(error); }}
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(found) + "END";
}};
</script>
"""


class Seen(NamedTuple):
    found: Any
    console: list[str]


def need_browser() -> str:
    """The browser's command; skips the test where there is none."""
    found = _browser()
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


@cache
def _browser() -> str | None:
    """The first that starts: some systems have a command that merely says how to install it."""
    for command in filter(None, map(shutil.which, NAMES)):
        if subprocess.run([command, "--version"], capture_output=True).returncode == 0:
            return command
    return None


def look(page: Path, folder: Path, script: str, *, width: int, dark: bool = False) -> Seen:
    """Open a page at a width and run a script on it.

    Args:
        page: An HTML file.
        folder: For the browser's own files.
        script: Of an async function with ``view`` (window) and ``page`` (document); what it returns
            becomes ``found``.
        width: In CSS pixels.
        dark: Whether the reader prefers a dark page.
    """
    around = folder / f"around-{width}-{dark}.html"
    text = page.read_text(encoding="utf-8")
    around.write_text(
        AROUND.format(width=width, page=html.escape(text), script=script), encoding="utf-8"
    )
    done = subprocess.run(
        [
            need_browser(),
            *FLAGS,
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width + 40},1000",
            "--dump-dom",
            around.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    told = re.search(r'<pre id="found">FOUND(.*)END</pre>', done.stdout, re.DOTALL)
    assert told, f"the page did not load: {console}"
    return Seen(json.loads(html.unescape(told[1])), console)
