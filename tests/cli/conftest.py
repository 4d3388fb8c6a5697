# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, and models small enough to train in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from shira import Adapter
from tests.adapters import random_adapter

WORDS = [
    "the",
    "film",
    "book",
    "meal",
    "was",
    "good",
    "great",
    "fine",
    "bad",
    "awful",
    "poor",
    "it",
    "is",
    "not",
    "very",
]
SHAPES = {f"layers.{i}.{kind}.weight": (16, 24) for i in range(2) for kind in ("up", "down")}


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def shira(capsys):
    """Runs a command line and gives exit status, standard output and standard error."""
    from shira.cli import main

    def run(*arguments) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def folders(tmp_path):
    """Three adapters on disk, and as values."""
    made = {}
    for seed, name in enumerate(("poems", "code", "law")):
        adapter = random_adapter(seed, SHAPES, k=40)
        made[name] = Adapter(dict(adapter), {"base_model_name_or_path": "some/model"})
        made[name].save(tmp_path / name, format="peft")
    return tmp_path, made


@pytest.fixture
def headed(tmp_path):
    """Two adapters that trained different heads, and one without."""
    made = {}
    for seed, name in enumerate(("poems", "code", "law")):
        head = {} if name == "law" else {"score.weight": torch.full((2, 3), float(seed))}
        made[name] = Adapter(random_adapter(seed, SHAPES, k=40), None, head)
        made[name].save(tmp_path / name, format="peft")
    return tmp_path, made


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with tiny models of the kinds BERT and GPT-2, and files to train them on."""
    folder = tmp_path_factory.mktemp("workshop")
    _make_models(folder)
    _make_files(folder)
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


def _make_models(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}

    def tokenizer() -> Tokenizer:
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        return made

    torch.manual_seed(0)
    framed = tokenizer()
    framed.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=framed, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder / "bert")
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder / "bert")
    # no padding token, as GPT-2 has none
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), eos_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder / "gpt2")
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(vocabulary),
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=3,
            eos_token_id=3,
        )
    ).save_pretrained(folder / "gpt2")


def _make_files(folder: Path) -> None:
    rng = random.Random(0)

    def row() -> tuple[str, str]:
        good = rng.random() < 0.5
        word = rng.choice(["good", "great", "fine"] if good else ["bad", "awful", "poor"])
        return f"the {rng.choice(['film', 'book', 'meal'])} was {word}", "yes" if good else "no"

    for name, count in (("train", 96), ("dev", 32)):
        rows = [row() for _ in range(count)]
        lines = "\n".join(f"{text},{label}" for text, label in rows)
        (folder / f"{name}.csv").write_text(f"text,label\n{lines}\n")
        (folder / f"{name}.txt").write_text("\n".join(text for text, _ in rows) + "\n")
        pairs = [{"prompt": text, "completion": label} for text, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
