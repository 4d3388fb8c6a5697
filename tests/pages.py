# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README.md and docs/."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
WORDS = ["[PAD]", "[UNK]", "[SEP]", "the", "film", "book", "was", "good", "bad"]


def fences(page: Path) -> list[tuple[str, str]]:
    """What stands after the opening ``` of each block, and the block's text."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(head, text) for head, text in found]


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of one language; at least one."""
    found = [text for head, text in fences(page) if head == language]
    assert found, f"{page.name} has no {language}"
    return found


def commands(page: Path) -> list[str]:
    """The lines of the ``sh`` blocks, without what follows a ``#``."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [found for line in lines if (found := line.partition(" #")[0].strip())]


def what_a_reader_has() -> None:
    """A model, rows and adapters, in the current folder."""
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
