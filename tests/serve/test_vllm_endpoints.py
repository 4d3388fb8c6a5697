# SPDX-License-Identifier: Apache-2.0
"""The settings of the endpoint plugin; `tests/serve/engine` has the rest, on a real server."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest

from shira.errors import ConfigError
from shira.serve import vllm_endpoints
from shira.serve.http.turns import carrying
from shira.serve.messages import KEY, carried


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


class Parameters(SimpleNamespace):
    def clone(self):
        return Parameters(**vars(self))


def test_no_client_has_a_salt_or_an_adapter_but_by_the_model_field(monkeypatch):
    exceptions = SimpleNamespace(VLLMValidationError=ValueError)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(exceptions=exceptions))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    seen = []

    async def add_request(request_id, prompt, params):
        seen.append((prompt, params.extra_args))

    engine = SimpleNamespace(add_request=add_request)
    vllm_endpoints._hand_on(engine)
    fr = carried({"fr": 1.0}, {"fr": "1"})

    async def ask(own, salt=None, **extra):
        prompt = {"prompt_token_ids": [1], **({} if salt is None else {"cache_salt": salt})}
        carrying.set(own)
        await engine.add_request("r", prompt, Parameters(extra_args=extra or None))
        prompt, told = seen.pop()
        return prompt.get("cache_salt"), told

    assert asyncio.run(ask(None)) == (None, None)
    assert asyncio.run(ask(fr)) == (fr.salt, {KEY: "fr"})
    assert asyncio.run(ask(fr, "mine")) == (f"{fr.salt}-mine", {KEY: "fr"})
    assert asyncio.run(ask(None, fr.salt))[0] not in (None, fr.salt)  # the base's blocks
    for own in (fr, None):
        with pytest.raises(ValueError, match="is not the client's"):
            asyncio.run(ask(own, **{KEY: "de"}))
    with pytest.raises(ValueError, match="only routes"):
        asyncio.run(engine.add_request("r", {}, Parameters(extra_args=None)))
