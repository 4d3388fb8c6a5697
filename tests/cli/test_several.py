# SPDX-License-Identifier: Apache-2.0
"""Several adapters on a command line: their names."""

from __future__ import annotations

from shira.cli.several import short_names


def test_short_names():
    assert short_names(["x/a", "x/b"]) == ["a", "b"]
    assert short_names(["x/a", "y/a", "b"]) == ["x/a", "y/a", "b"]
    assert short_names(["x/a", "x/a"]) == ["a (1)", "a (2)"]
    assert short_names(["x/a", "y/a", "x/../x/a"]) == ["x/a (1)", "y/a", "x/a (2)"]
