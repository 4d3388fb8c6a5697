# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest

from shira.errors import ConfigError
from shira.store.patterns import check_pattern, check_patterns, matching

NAMES = [
    f"model.language_model.layers.{layer}.{block}"
    for layer in range(3)
    for block in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "input_layernorm")
]

# What people write: from PEFT's documentation and examples, and from what unsloth writes.
SOUND = (
    "q_proj",
    "all-linear",
    r".*\.(q_proj|v_proj)$",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"model\.layers\.(0|1)\..*",
    r"^(?!.*(vision|audio)).*(q_proj|v_proj)$",
    r"(?:(?!vision).)*q_proj",
    r".*\.layers\.\d+\..*\.(self_attn|mlp)\..*_proj",
    r"(?:.*\.)?attn\.(to_q|to_k|to_v|to_out\.0)",
    r"model\.language_model\.layers\.[\d]+\.(mlp|self_attn)\.((gate|up|down|q|k|v|o)_proj)",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj)))",
    r".*\.(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj)|ff\.net\.(0|2))",
    r"(model\.)?(layers\.\d+\.)+q_proj",
    r"[^.]+(\.[^.]+)*\.q",
    r"(\w+\.)*q_proj",
    r".*\.\d+\..*\.\d+\..*",
    r"\w+\.\w+\.\w+\.\w+\.\w+\.q",
    "|".join(NAMES * 50),
)
HOSTILE = (
    r"(a+)+b",
    r"(.*)*x",
    r"(a|a)*b",
    r"(a|aa)+b",
    r"(.|\w)*x",
    r"(?:a|b|ab)*c",
    r"([a-z]+)*1",
    r"(model.?)*x",
    r"(\w+\.?)*x",
    r"(.*a){30}",
    r"(a?){60}a{60}",
    r"((a{1,9}){1,9}){1,9}b",
    r"(?=(a+)+b)a",
    r"(((((((a+)+)+)+)+)+)+)+b",
    r"(?<!x)(.+)+\1x",
    "a?" * 40 + "a" * 40,
    ".*" * 9 + "x",
    "[a-z]*" * 6 + "1",
    r"(?i)(?:ab|AB)*d",
)


@pytest.mark.parametrize("pattern", SOUND)
def test_what_people_write_is_accepted(pattern: str) -> None:
    check_pattern(pattern, "it")
    for name in NAMES:
        re.fullmatch(pattern, name)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_what_could_take_minutes_is_refused(pattern: str) -> None:
    re.compile(pattern)
    with pytest.raises(ConfigError, match="it could take minutes"):
        check_pattern(pattern, "it")


@pytest.mark.parametrize("pattern", ["[", "*", "a{99999999999}", "(" * 2000 + ")" * 2000])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="it is no regular expression"):
        check_pattern(pattern, "it")


def test_a_long_pattern() -> None:
    check_pattern("x" * 50_000, "it")
    with pytest.raises(ConfigError, match="it is too long"):
        check_pattern("x" * 50_001, "it")


def test_every_field_of_patterns() -> None:
    evil = "(a+)+b"
    check_patterns({"target_modules": [evil], "exclude_modules": {evil}, "r": evil})  # plain names
    for fields in (
        {"target_modules": evil},
        {"exclude_modules": evil},
        {"modules_to_save": ["head", evil]},
        {"layers_pattern": evil},
        {"layers_pattern": ["h", evil]},
        {"rank_pattern": {"q": 1, evil: 2}},
        {"alpha_pattern": {evil: 2}},
    ):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            check_patterns(fields)
    with pytest.raises(ConfigError, match="more than 10000 patterns"):
        check_patterns({"rank_pattern": dict.fromkeys(map(str, range(10_001)), 1)})


def test_all_patterns_together() -> None:
    slow = {f".*.*x{number}": 1 for number in range(1000)}
    check_patterns({"rank_pattern": dict.fromkeys(list(slow)[:50], 1)})
    with pytest.raises(ConfigError, match="all patterns together could take minutes"):
        check_patterns({"rank_pattern": slow})
    check_patterns({"rank_pattern": {f"model.layers.{i}.self_attn.q_proj": i for i in range(9999)}})


def test_names_of_any_length_and_characters() -> None:
    for pattern, name in ((".*.*x", "a." * 2000), ("a*a*a*a*a*b", "a" * 128)):
        check_pattern(pattern, "it")
        with pytest.raises(ConfigError, match="it could take minutes"):
            check_pattern(pattern, "it", ["q", name])
    check_pattern("q_proj", "it", ["a." * 2000])
    for pattern in SOUND:
        check_pattern(pattern, "it", NAMES)


def test_the_first_pattern_that_matches_the_end() -> None:
    patterns = {"v_proj": 1, r"layers\.[01]\.self_attn\..*": 2, "q_proj": 3}
    assert [matching(patterns, name, 0) for name in NAMES[:8:3]] == [2, 0, 0]
    assert [matching(patterns, name, 0) for name in NAMES[8:]] == [3, 1, 0, 0]
    assert matching(None, "q_proj", 5) == 5
    assert matching({"proj": 1}, "q_proj", 0) == 0
