# SPDX-License-Identifier: Apache-2.0
"""Markup that cannot be injected into: text is escaped unless it is `Html`, which `tag` makes.

Names, paths and metadata come from files that nobody vouches for. A plain string is always text;
formatting or adding `Html` gives a plain string again, which is then escaped: a mistake shows as
visible markup, never as a hole.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"meta", "wbr"})


class Html(str):
    """Markup."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element.

    Args:
        name: Of the element; from our own code.
        children: Text is escaped, `Html` is not, None is nothing; iterables are strung together.
        attributes: A trailing underscore is dropped, others become hyphens; True stands without a
            value, None and False are left out.
    """
    given = "".join(
        f" {_attribute(key)}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Child) -> Html:
    """Children one after the other, without an element around them."""
    if children is None:
        return Html()
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return Html(escape(children))
    if isinstance(children, (int, float)):
        return Html(children)
    return Html("".join(joined(child) for child in children))


def escape(text: str) -> str:
    """Text as markup, also inside quotes; control characters, which HTML has not, as U+FFFD."""
    shown = "".join(
        c if c.isprintable() or c in " \n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return html.escape(shown, quote=True)


def verbatim(text: str) -> Html:
    """A style sheet or script of our own, for ``style`` and ``script`` elements.

    Raises:
        ValueError: If it holds what would end the element.
    """
    if "</" in text or "<!--" in text:
        raise ValueError("a script or style sheet inside a page cannot hold '</' or '<!--'")
    return Html(text)


def json_block(value: Any) -> Html:
    """A value as JSON that stands in a ``script`` element and cannot end it."""
    return verbatim(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
