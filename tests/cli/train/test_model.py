# SPDX-License-Identifier: Apache-2.0
"""The adapter that the options describe."""

from __future__ import annotations

import pytest
from torch import nn

from shira.cli.train.model import check_modules, parse_targets
from shira.cli.train.options import TrainOptions
from shira.errors import ConfigError, TargetError


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("layers.0.q,layers.1.q", ["layers.0.q", "layers.1.q"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"layers\.\d{1,2}\.q", r"layers\.\d{1,2}\.q"),
    ],
)
def test_targets(text, targets):
    assert parse_targets(text) == targets


def test_targets_that_are_neither():
    with pytest.raises(TargetError, match="neither names nor a regular expression"):
        parse_targets("layers.(q")


def saving(names):
    model = nn.ModuleDict({"body": nn.ModuleDict({"ln_f": nn.Linear(1, 1)}), "lm_head": nn.ReLU()})
    check_modules(model, TrainOptions(modules_to_save=names))


@pytest.mark.parametrize(
    "names",
    [None, "ln_f", "ln_f, lm_head", "body.ln_f", "base_model.model.lm_head", "head", "n_f"],
)
def test_modules_to_save_are_those_whose_path_ends_with_the_name(names):
    saving(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ln_f,lm_haed", r"--modules-to-save lm_haed: the .*\. Did you mean 'lm_head'\?$"),
        ("boddy.ln_f", r"boddy\.ln_f: the .*\. Did you mean 'body\.ln_f'\?$"),
        ("lm_head.weight", "no such module"),
        ("ln_f.body", "no such module"),
    ],
)
def test_a_module_to_save_that_the_model_lacks(names, message):
    with pytest.raises(ConfigError, match=message):
        saving(names)
