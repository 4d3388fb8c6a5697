# SPDX-License-Identifier: Apache-2.0
"""Options of `shira train`: command line over file over default, and what is refused."""

from __future__ import annotations

import pytest

from shira.cli._train.options import resolve
from shira.errors import ConfigError


@pytest.fixture
def needed(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    return {
        "model": "some/model",
        "task": "causal-lm",
        "train_file": str(tmp_path / "train.csv"),
        "output": "out",
    }


def write(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_command_line_over_file_over_default(needed, tmp_path):
    config = write(
        tmp_path,
        "learning-rate: 1e-3\nseed: 5\nbatch_size: 4\nbf16: true\n"
        "target-modules: [q_proj, v_proj]\nepochs: 2\nr: null\n",
    )
    options = resolve({**needed, "seed": 7, "learning_rate": None}, config)
    assert options.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert options.seed == 7
    assert options.batch_size == 4
    assert options.bf16 is True
    assert options.target_modules == "q_proj,v_proj"
    assert (options.epochs, type(options.epochs)) == (2.0, float)
    assert options.r is None
    assert options.scheduler == "linear"


def test_the_command_line_can_take_back_a_flag(needed, tmp_path):
    assert resolve({**needed, "bf16": False}, write(tmp_path, "bf16: true\n")).bf16 is False


def test_one_budget_takes_the_place_of_the_other(needed, tmp_path):
    options = resolve({**needed, "r": 4}, write(tmp_path, "density: 0.1\n"))
    assert (options.r, options.density) == (4, None)


def test_all_may_stand_in_the_file(needed, tmp_path):
    lines = "\n".join(f"{name}: {value}" for name, value in needed.items())
    assert resolve({}, write(tmp_path, lines)).model == "some/model"


def test_an_empty_file_says_nothing(needed, tmp_path):
    assert resolve(needed, write(tmp_path, "")) == resolve(needed, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1\n", "unknown option 'learning_rte'. Did you mean 'learning_rate'"),
        ("seed: many\n", "seed: 'many' is not an integer"),
        ("seed: true\n", "seed: True is not an integer"),
        ("seed: 1.5\n", "seed: 1.5 is not an integer"),
        ("learning_rate: fast\n", "learning_rate: 'fast' is not a number"),
        ("bf16: 1\n", "bf16: 1 is not true or false"),
        ("model: 3\n", "model: 3 is not text"),
        ("- a\n- b\n", "not a list"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_file_that_cannot_be_meant(needed, tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        resolve(needed, write(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "--model is needed"),
        ({"output": None}, "--output is needed"),
        ({"task": "causal"}, "'causal'. Did you mean 'causal-lm'"),
        ({"dtype": "bf16"}, "--dtype is one of"),
        ({"r": 4, "density": 0.1}, "two ways"),
        ({"eval_file": "x", "eval_fraction": 0.1}, "give one"),
        ({"eval_fraction": 1.0}, "between 0 and 1"),
        ({"batch_size": 0}, "--batch-size is above 0, not 0"),
        ({"learning_rate": -1.0}, "--learning-rate is above 0"),
        ({"warmup": -1.0}, "--warmup"),
    ],
)
def test_values_that_cannot_be_meant(needed, given, message):
    with pytest.raises(ConfigError) as error:
        resolve({**needed, **given}, None)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["train_file", "eval_file"])
def test_a_file_that_is_not_there(needed, name):
    with pytest.raises(FileNotFoundError):
        resolve({**needed, name: "no/such/file.csv"}, None)
