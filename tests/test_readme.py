# SPDX-License-Identifier: Apache-2.0
"""What README.md shows runs: its Python as one program, its commands in turn."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tests.pages import README, blocks, commands

WORDS = ["[PAD]", "[UNK]", "[SEP]", "the", "film", "book", "was", "good", "bad"]


@pytest.mark.filterwarnings("ignore")
def test_python_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(README, "python"))
    assert code.count("import") > 3
    namespace: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), namespace)
    mixed = namespace["mixed"].logits  # type: ignore[attr-defined]
    assert mixed.isfinite().all()
    total = next(line.split() for line in capsys.readouterr().out.splitlines() if "all  " in line)
    assert not {"0", "0.0000", "+0.0000"} & set(total), total  # something to look at


def test_commands(tmp_path, monkeypatch):
    """In their order, in a folder that holds what their reader has: a model, rows, adapters."""
    from shira.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    what_a_reader_has()
    lines = [shlex.split(line) for line in commands(README)]
    assert len(lines) >= 13
    for program, command, *arguments in lines:
        if program == "make":
            assert f"\n{command}: " in README.with_name("Makefile").read_text()
            continue
        assert program == "shira"
        if command == "demo":
            continue  # takes minutes; tests/cli/test_demo.py runs it with --quick
        arguments = ["llama" if word == "MODEL" else word for word in arguments]
        with pytest.raises(SystemExit) as stop:
            main([command, *arguments])
        assert not stop.value.code, (command, *arguments)
        if command == "merge":
            shutil.copytree("llama-merged", "llama-tuned")
    for made in ("masks.png", "both", "overlap.png", "report.html", "extracted.safetensors"):
        assert Path(made).exists(), made
    for file in Path("llama").iterdir():
        assert file.read_bytes() == Path("llama-again", file.name).read_bytes()


def what_a_reader_has() -> None:
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from shira import ShiraConfig, get_peft_model

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    ).save_pretrained("llama")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"vocab_size": len(WORDS), "num_attention_heads": 4, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained("llama")
    rows = ["the film was good,yes", "the book was bad,no"] * 8
    Path("train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    for name, config in {
        "poems": ShiraConfig(r=2, target_modules=["q_proj"], random_seed=0),
        "code": ShiraConfig(r=2, target_modules=["q_proj"], random_seed=1),
        "my-lora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    }.items():
        model = get_peft_model(LlamaForCausalLM.from_pretrained("llama"), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(name)


def test_the_table_of_masks_is_complete():
    from shira.masks import MASKS

    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert listed == ["mask_type", *MASKS]
