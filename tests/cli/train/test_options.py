# SPDX-License-Identifier: Apache-2.0
"""Options of `shira train`: command line over file over default, and what is refused."""

from __future__ import annotations

import math

import pytest

from shira.cli.train.options import resolve
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
        ("- a\n- b\n", "'name: value' lines"),
        ("a: [\n", "not YAML"),
        ("epochs: .inf\n", "--epochs is a finite number, not inf"),
        ("epochs: 1e999\n", "--epochs is a finite number, not inf"),
        ("learning_rate: .nan\n", "--learning-rate is a finite number, not nan"),
        ("seed: -1\n", "--seed is not below 0"),
        (f"seed: {2**70}\n", "an integer of 71 bits"),
        (f"epochs: 0x{'f' * 5000}\n", "an integer of 20000 bits"),
        (f"seed: {'9' * 5000}\n", "not YAML"),
        (f"0x{'f' * 500}: 1\n", "name is text"),
        ("model: {a: {b: 1}}\n", "not nested"),
        ("model: " + "[" * 50_000, "not YAML: maximum recursion"),
        ("a: &a [x, x]\nmodel: [*a, *a]\n", "not nested"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", "not nested"),
        ("model: {a: 1}\n", "not nested"),
        ("model: {}\n", "not nested"),
        ("model: !!python/object/apply:os.system [exit]\n", "not YAML"),
        ("bf16: !!bool maybe\n", "not YAML"),
        ("seed: 1\nseed: 2\n", "option 'seed' stands there twice"),
        ("batch_size: 1\nbatch-size: 2\n", "stands there twice"),
        ("? [a, b]\n: 1\n", "name is text"),
        ("just text\n", "'name: value' lines"),
        ("a: 1\n" * 20_000, "65536 bytes at most"),
    ],
)
def test_invalid_files(needed, tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        resolve(needed, write(tmp_path, text))
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_file_that_is_no_utf8(needed, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes("model: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not YAML"):
        resolve(needed, path)


def test_what_may_be_extreme(needed, tmp_path):
    config = write(tmp_path, "mask-seed: -3\nmax-grad-norm: 0\nwarmup: 0\nr: 1\n")
    options = resolve({**needed, "seed": 2**32 - 1}, config)
    assert (options.mask_seed, options.seed) == (-3, 2**32 - 1)


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
        *(({"epochs": n}, "--epochs") for n in (math.inf, math.nan, 0.0, -1.0, 1e300)),
        *(({"learning_rate": n}, "--learning-rate") for n in (math.inf, math.nan, 0.0, -math.inf)),
        *(({name: math.inf}, "finite") for name in ("warmup", "weight_decay", "max_grad_norm")),
        *(({"density": n}, "--density") for n in (0.0, -0.1, 1.5, math.nan)),
        ({"eval_fraction": math.nan}, "--eval-fraction"),
        *(({"seed": n}, "--seed") for n in (-1, 2**32, 2**70)),
        ({"mask_seed": 2**70}, "--mask-seed"),
        ({"mask_slot": -1}, "--mask-slot"),
        *(({"r": n}, "--r") for n in (0, -4, 2**40)),
        ({"max_steps": 2**31}, "--max-steps is at most"),
        ({"max_length": -1}, "--max-length"),
        ({"output": ""}, "--output is needed"),
        ({"output": "a\0b"}, "--output 'a\\x00b' is no text"),
        ({"model": "caf\udce9"}, "--model 'caf\\udce9' is no text"),
    ],
)
def test_invalid_values(needed, given, message):
    with pytest.raises(ConfigError) as error:
        resolve({**needed, **given}, None)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["train_file", "eval_file"])
def test_a_file_that_is_not_there(needed, name):
    with pytest.raises(FileNotFoundError):
        resolve({**needed, name: "no/such/file.csv"}, None)
