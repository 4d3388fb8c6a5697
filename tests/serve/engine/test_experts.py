# SPDX-License-Identifier: Apache-2.0
"""Adapters of a mixture's experts, by the names that the model has in memory, in vLLM for CPUs.

They are a row of the table "where LoRA works, does SHiRA?", whose other rows are served on request.
"""

from __future__ import annotations

import pytest

from tests.reach.serving import EXPERTS, SERVED, ask, cell

pytestmark = pytest.mark.vllm


def test_served_as_the_merged_model_and_as_the_table_says(tmp_path, forked):
    assert ask(SERVED[EXPERTS], tmp_path) == cell(EXPERTS) == ("yes", "")
