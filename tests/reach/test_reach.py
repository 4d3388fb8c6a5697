# SPDX-License-Identifier: Apache-2.0
"""The page says what running each row says, and nothing on it is wrong or fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.reach import serving, trainers
from tests.reach.case import ROWS, Case, ask
from tests.reach.page import PAGE, answer, line, page, read


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_row_says_what_it_did(row):
    if row.missing:
        pytest.skip(f"{', '.join(row.missing)} is not installed")
    assert line(row, answer(row)) == read().get(row.name), "python -m tests.reach makes the page"


def test_the_page_is_made_of_the_rows():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert PAGE.read_text() == page(read())


def test_nothing_is_wrong_and_nothing_fails():
    assert not [found for found in read().values() if "WRONG" in found or "FAILS" in found]


def test_what_is_served_is_what_was_run():
    """And what was not run says why, but for trainers and for packed weights."""
    found = serving.served()
    assert [*found["rows"]] == [*serving.SERVED]
    assert found["date"]
    names = {row.name for row in ROWS}
    assert {*serving.SERVED, *serving.NOT_SERVED} <= names
    assert not {*serving.SERVED} & {*serving.NOT_SERVED}
    for row in ROWS:
        word, note = serving.cell(row.name)
        assert word in ("yes", "refused", "-")
        told = row.section == trainers.KIND or row.name.startswith("quantized: ")
        assert word == "yes" or note or told, row.name
        assert read()[row.name].split(" | ")[-2] == word


class Forgetful(nn.Linear):
    """A layer that computes something else each time."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 3)


def test_a_model_that_computes_something_else_is_wrong(tmp_path):
    x = torch.randn(4, 8)
    case = Case(
        lambda: nn.Sequential(Forgetful(8, 8)), lambda model: model(x), {"target_modules": ["0"]}
    )
    assert "WRONG" in ask(case, tmp_path).cells.values()
