# SPDX-License-Identifier: Apache-2.0
"""What other libraries say between a command's lines: what nobody needs to hear is left out."""

from __future__ import annotations

import logging

import pytest

from shira.cli.output import no_accelerator_note


@pytest.fixture
def deepspeed():
    """DeepSpeed's logger as it is before DeepSpeed is imported, and what comes through it."""
    logger = logging.getLogger("DeepSpeed")
    filters, logger.filters = logger.filters, []
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield logger, heard
    logger.removeHandler(handler)
    logger.filters = filters


def test_only_the_note_about_the_accelerator_is_dropped(deepspeed):
    logger, heard = deepspeed
    no_accelerator_note()
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, ...")
    logger.warning("the loss scale is %d", 3)
    assert heard == ["the loss scale is 3"]
