# SPDX-License-Identifier: Apache-2.0
"""The settings of the endpoint plugin; `tests/serve/engine` has the rest, on a real server."""

from __future__ import annotations

import pytest

from shira.errors import ConfigError
from shira.serve import vllm_endpoints


def test_the_limit_of_bodies(monkeypatch):
    monkeypatch.delenv("SHIRA_BODY_LIMIT", raising=False)
    assert vllm_endpoints._bytes("SHIRA_BODY_LIMIT", 16 * 2**20) == 16 * 2**20
    monkeypatch.setenv("SHIRA_BODY_LIMIT", "1000")
    assert vllm_endpoints._bytes("SHIRA_BODY_LIMIT", 16 * 2**20) == 1000


@pytest.mark.parametrize("text", ["", "-1", "1e6", "nan", "16 MiB", "9" * 5000, "\u0663"])
def test_a_limit_that_is_none(monkeypatch, text):
    monkeypatch.setenv("SHIRA_BODY_LIMIT", text)
    with pytest.raises(ConfigError, match="SHIRA_BODY_LIMIT"):
        vllm_endpoints._bytes("SHIRA_BODY_LIMIT")
