# SPDX-License-Identifier: Apache-2.0
"""The page as a whole: one file that loads nothing, and runs no script but its own.

Its content security policy names the script by its hash and allows no connection, so that even a
name that got past the escaping could run nothing.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from shira._version import __version__
from shira.cli._report.gather import Report
from shira.cli._report.html import Html, json_block, tag, verbatim
from shira.cli._report.sections import adapter_section, pairs_section


def page(report: Report) -> str:
    """The HTML document; the same adapters give the same text."""
    style, script = _resource("page.css"), _resource("page.js")
    names = ", ".join(described.name for described in report.adapters)
    sections = []
    maps: list[dict[str, Any]] = []
    for described in report.adapters:
        sections.append(adapter_section(described, len(maps)))
        maps += [made.as_json() for made in described.maps]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{names} - shira report"),
        tag("style", style),
    )
    body = tag(
        "body",
        tag("header", tag("h1", _title(report))),
        tag("main", pairs_section(report), sections),
        _viewer(),
        tag("footer", f"Made by shira {__version__}."),
        tag("script", json_block(maps), type="application/json", id="maps"),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _title(report: Report) -> str:
    count = len(report.adapters)
    return "One sparse adapter" if count == 1 else f"{count} sparse adapters"


def _viewer() -> Html:
    """Where one map is looked at: the script fills it."""
    buttons = (
        ("back", "\N{LEFTWARDS ARROW}", "the weight before"),
        ("on", "\N{RIGHTWARDS ARROW}", "the next weight"),
        ("in", "+", "zoom in"),
        ("out", "\N{MINUS SIGN}", "zoom out"),
        ("whole", "whole", "the whole weight"),
        ("close", "close", "close"),
    )
    return tag(
        "dialog",
        tag("h3", id="name"),
        tag(
            "div",
            (
                tag("button", shown, type="button", data_do=do, aria_label=label, title=label)
                for do, shown, label in buttons
            ),
            class_="tools",
        ),
        tag("canvas", id="large", tabindex=0, width=1, height=1),
        tag("p", id="readout", aria_live="polite"),
        tag("p", "Wheel or pinch to zoom, drag to move; keys: + - 0 and arrows.", class_="note"),
        id="viewer",
        aria_labelledby="name",
    )


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> Html:
    text = (files("shira.cli._report") / name).read_text(encoding="utf-8")
    return verbatim(text)
