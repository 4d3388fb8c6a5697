# SPDX-License-Identifier: Apache-2.0
"""Names, paths and metadata that a terminal, rich, matplotlib or Markdown would obey: shown."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from shira import Adapter, SparseDelta, Support
from shira.base import fingerprint
from shira.errors import shown

ESCAPES = "\x1b[31mred\x1b]8;;http:evil\x07\x9b2J\x08\r\n\u202eright\u2066\u200b"
MARKUP = "[/v2][link=http:e][bold]no[reverse]$\\frac$ :smile: <b>`x`"
EVIL = MARKUP + ESCAPES
FORBIDDEN = "\x1b\x9b\x07\x08\r\u202e\u2066\u200b"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Adapters in both formats, a base, a LoRA: every text in them is hostile, and the paths."""
    monkeypatch.chdir(tmp_path)
    weights = {f"{EVIL}.{number}.weight": torch.randn(8, 8) for number in range(2)}
    Path(f"base{EVIL.replace('/', '')}").mkdir()
    base = next(Path().glob("base*"))
    save_file(weights, base / "model.safetensors")
    for number in range(2):
        support = Support((8, 8), torch.arange(9) + number)
        deltas = {name: SparseDelta(support, torch.randn(9)) for name in weights}
        prints = {n: fingerprint(w.view(-1)[support.indices.long()]) for n, w in weights.items()}
        metadata = {
            "base_model_name_or_path": EVIL,
            "mask_type": EVIL,
            "mask_options": {EVIL: EVIL},
            "base_fingerprint": prints,
            "revision": EVIL,
        }
        Adapter(deltas, metadata).save(f"{number}{EVIL.replace('/', '')}")
        adapter = Adapter(deltas, metadata, {f"{EVIL}.head": torch.ones(2)})
        adapter.save(f"peft{number}{EVIL.replace('/', '')}", format="peft")
    lora = Path(f"lora{EVIL.replace('/', '')}")
    lora.mkdir()
    name = f"base_model.model.{EVIL}.0"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(8, 1)}
    save_file(tensors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    named = {"BASE": base, "LORA": lora}
    for kind in ("A", "B"):
        number = int(kind == "B")
        named[kind] = next(Path().glob(f"{number}*"))
        named[f"{kind}P"] = next(Path().glob(f"peft{number}*"))
    named["OUT"] = Path(f"out{EVIL.replace('/', '')}")
    return named


COMMANDS = (
    "inspect A",
    "inspect AP --all",
    "inspect AP --base BASE",
    "inspect A --base BASE --plot OUT.png",
    "report A BP --base BASE -o OUT.html",
    "overlap A B --all --rank",
    "overlap A BP --plot OUT.png",
    "overlap A B AP",
    "fuse A B=0.5 -o OUT --no-check-base",
    "fuse A -o OUT --format peft",
    "convert AP -o OUT",
    "convert LORA -o OUT",
    "convert LORA -o OUT --base BASE",
    "merge A --base BASE -o OUT --undo OUTU",
    "extract BASE BASE -o OUT",
    "switch-bench A B --repeats 1 --no-compare",
)
MISTAKES = (
    "inspect OUT",
    "inspect A --base OUT",
    "report A -o OUT/x",
    "report A -o A",
    "overlap A OUT",
    "overlap A B --figure OUT",
    "fuse A B -o OUT --method OUT",
    "fuse A=OUT -o OUT",
    "merge A --base OUT -o OUT",
    "merge LORA --base BASE -o OUT",
    "unmerge BASE --undo A -o OUT",
    "convert A -o OUT --format OUT",
    "switch-bench A --dtype OUT",
    "serve --adapters OUT OUT",
    "train --model OUT --task OUT --train-file OUT --output OUT",
    "train --config OUT",
    "OUT",
    "inspect A --OUT",
)


def run(shira, words, named):
    def filled(word):
        match = re.fullmatch(r"(--)?(BASE|LORA|OUT|AP|BP|A|B)(.*)", word)
        return f"{match[1] or ''}{named[match[2]]}{match[3]}" if match else word

    return shira(*map(filled, words.split()))


def check(answer, *, terminal):
    for text in (answer.out, answer.err):
        if terminal:  # what rich itself writes: colours and bars
            assert "\x1b[31mred" not in text
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)
        assert not [c for c in FORBIDDEN if c in text], ascii(text)
        assert "Traceback" not in text


@pytest.mark.parametrize("terminal", [False, True], ids=["piped", "terminal"])
@pytest.mark.parametrize("words", COMMANDS)
def test_what_commands_print(shira, place, words, terminal, monkeypatch):
    if terminal:
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
        monkeypatch.setenv("COLUMNS", "250")
    answer = run(shira, words, place)
    assert answer.status in (0, 1), answer.err
    check(answer, terminal=terminal)
    seen = re.sub(r"\s|\|", "", answer.out)
    assert "v2][link=http:e][bold]" in seen
    assert "\\x1b" in seen


def test_a_very_long_text_is_cut(shira, tmp_path):
    delta = SparseDelta(Support((8, 8), torch.arange(3)), torch.ones(3))
    name = "n" * 10**6
    adapter = Adapter({f"{name}.weight": delta}, {"base_model_name_or_path": "\x1b" * 10**6})
    adapter.save(tmp_path / "long")
    answer = shira("inspect", tmp_path / "long")
    assert answer.status == 0
    assert len(answer.out) < 10**5
    assert "(1,000,007 characters; --json prints all)" in answer.out
    assert name in shira("inspect", tmp_path / "long", "--json").out


@pytest.mark.parametrize("words", MISTAKES)
def test_what_errors_say(shira, place, words):
    if words.startswith("serve"):
        pytest.importorskip("vllm")
    answer = run(shira, words, place)
    assert answer.status == 2
    assert answer.err.startswith("error: ")
    assert len(answer.err.splitlines()) == 1
    check(answer, terminal=False)


def test_the_bar_of_a_terminal(monkeypatch, capsys):
    from shira.cli.progress import Steps, say

    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    with Steps(f"{EVIL}", 10) as steps:
        steps.update(3, EVIL)
    say(EVIL)
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "\x1b]8" not in printed
    assert "\u202e" not in printed
    assert "[/v2]" in printed


def test_warnings_log_messages_and_tracebacks(monkeypatch, capsys):
    from shira.cli.output import plain_messages

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    try:
        plain_messages()
        record = logging.getLogger("x").makeRecord("x", 30, "f", 1, "of %s", (EVIL,), None)
        assert "\x1b" not in logging.Formatter("%(message)s").format(record)
        assert "\x1b" not in warnings.formatwarning(EVIL, UserWarning, "f", 1)
        try:
            raise ValueError(EVIL)
        except ValueError as error:
            told = type(error), error, error.__traceback__
        record = logging.getLogger("x").makeRecord("x", 40, "f", 1, "of", (), told)
        logged = logging.Formatter("%(message)s").format(record)
        sys.excepthook(*told)
        threading.excepthook(threading.ExceptHookArgs((*told, None)))
        said = capsys.readouterr().err
        assert said.startswith("Traceback")
        assert said.count("Traceback") == 2
        assert "Traceback" in logged
        assert not [c for c in FORBIDDEN if c in said + logged]
    finally:
        logging.setLogRecordFactory(factory)


def test_the_model_card(monkeypatch):
    import yaml

    from shira.cli.train.data import Data
    from shira.cli.train.options import TrainOptions
    from shira.cli.train.outputs import Result, model_card

    evil = f"{EVIL}\n# heading\n```\n---\nlicense: mit\n<script>"
    monkeypatch.setattr(sys, "argv", ["shira", "train", "--model", evil])
    options = TrainOptions(
        model=evil, task="text-classification", train_file=evil, eval_file=evil, output=evil
    )
    data = Data(train=[1], evaluation=[1], labels=(evil, "`", "plain"))
    result = Result({}, {"loss": 1.0}, [], 1.0, 1, 1, 2, 1.0, 1, "cpu", None)
    config = SimpleNamespace(density=0.1, r=1, mask_type=evil, random_seed=1)
    card = model_card(options, data, result, config, plot=False)
    assert not [c for c in FORBIDDEN if c in card]
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": evil,
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["shira", "sparse-high-rank-adapter", "peft"],
    }
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#")][1:] == [
        *("## Result", "## Data", "## Adapter", "## Use", "## How it was made"),
    ]
    assert sum(line.strip("`") in ("", "python", "bash") and "`" in line for line in lines) == 4
    prose = re.sub(r"(?s)(`{3,})(python|bash)\n.*?\n\1", "", text)
    prose = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert "<script>" not in prose
    assert "[/v2]" not in prose


def test_a_text_as_it_is_shown():
    assert shown("plain \u00e9 \u4e2d [/b]") == "plain \u00e9 \u4e2d [/b]"
    assert shown("a\x1b[1m\u202e\ud800\nb\t") == r"a\x1b[1m\u202e\ud800\nb\t"
    assert shown("a\x1b\nb\t", lines=True) == "a\\x1b\nb\t"
    assert os.path.exists(shown(__file__))
