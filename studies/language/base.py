# SPDX-License-Identifier: Apache-2.0
"""The base model: a tokenizer and a small Llama, both made from the source text alone.

Neither is kept in git: ``python -m studies.language base`` makes them again, in some minutes on one
thread. Another processor rounds differently, so that the bits, and with them all that follows, may
differ there; `Made.model_sha256` tells.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studies.language import data as texts
from studies.language.protocol import Base

TOKENIZER, MODEL, RECORD = "tokenizer.json", "model.safetensors", "base.json"


@dataclass(frozen=True)
class Made:
    """A base model that was made: where it is, and the hashes of its two files."""

    folder: Path
    tokenizer_sha256: str
    model_sha256: str

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.folder / TOKENIZER


def find(folder: Path, base: Base) -> Made | None:
    """The base model in a folder; None where there is none of this configuration, whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        hashes = [_sha256(folder / name) for name in (TOKENIZER, MODEL)]
    except (OSError, ValueError):
        return None
    if record != {"key": base.key, TOKENIZER: hashes[0], MODEL: hashes[1]}:
        return None
    return Made(folder, *hashes)


def make(
    data: Path, folder: Path, base: Base, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make the base model in `folder`. What is kept is the model of the best validation loss.

    Returns:
        Loss (mean negative log-likelihood of a token, in nats) on the source's validation and test
        windows, the step that was kept, what validation gave at each look, parameters, seconds,
        and hashes.
    """
    from safetensors.torch import save_file

    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    text, _ = texts.read(data, base.source, "train.txt")
    _train_tokenizer(text, base.vocabulary, folder / TOKENIZER)
    training = source(data, folder / TOKENIZER, base, validation=base.validation_windows)
    model = new(base)
    best, looks = _train(model, base, training, say)
    model.load_state_dict(best)
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / MODEL)
    test, test_sha256 = texts.test_windows(
        data, base.source, folder / TOKENIZER, window=base.window, count=base.test_windows
    )
    hashes = {name: _sha256(folder / name) for name in (TOKENIZER, MODEL)}
    (folder / RECORD).write_text(json.dumps({"key": base.key, **hashes}), encoding="utf-8")
    kept = min(looks, key=lambda look: look[1])
    return {
        "validation_loss": kept[1],
        "test_loss": round(mean_loss(model, test), 5),
        "kept_step": kept[0],
        "looks": looks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": training.blocks.numel(),
        "tokenizer_sha256": hashes[TOKENIZER],
        "model_sha256": hashes[MODEL],
        "train_sha256": training.sha256,
        "test_sha256": test_sha256,
        "seconds": round(time.perf_counter() - started, 2),
    }


def new(base: Base) -> nn.Module:
    """The model as it is before training, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=base.vocabulary,
        hidden_size=base.hidden,
        intermediate_size=base.intermediate,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        max_position_embeddings=base.window,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(base.seed)
    model: nn.Module = LlamaForCausalLM(config).float()
    return model


def load(made: Made, base: Base) -> nn.Module:
    """The trained model."""
    from safetensors.torch import load_file

    model = new(base)
    weights = load_file(made.folder / MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights, sorted(weights)
    return model


def source(data: Path, tokenizer: Path, base: Base, *, validation: int) -> texts.Training:
    """The source text. Its training blocks are the same ones however many windows are asked for.

    Raises:
        ValueError: If `validation` is more than the base's own.
    """
    if validation > base.validation_windows:
        raise ValueError(f"{validation} windows: the base held out {base.validation_windows}")
    whole = texts.training(
        data,
        base.source,
        tokenizer,
        window=base.window,
        block_windows=base.block_windows,
        validation=base.validation_windows,
    )
    return texts.Training(whole.blocks, texts.spread(whole.validation, validation), whole.sha256)


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor, batch: int = 16) -> float:
    """Mean negative log-likelihood of a token, in nats: of all of a window but its first."""
    was_training = model.training
    model.eval()
    total = sum(float(model(input_ids=w, labels=w).loss) * len(w) for w in windows.split(batch))
    model.train(was_training)
    return total / len(windows)


def _train(
    model: nn.Module, base: Base, training: texts.Training, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    rng = random.Random(f"base {base.seed}")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=base.rate, betas=(0.9, 0.95), weight_decay=base.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, base))
    looks: list[tuple[int, float]] = []
    best: dict[str, Tensor] = {}
    model.train()
    for step in range(1, base.steps + 1):
        windows = texts.draw(training.blocks, base.window, base.batch_size, rng)
        model(input_ids=windows, labels=windows).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), base.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % base.look_every == 0 or step == base.steps:
            looks.append((step, round(mean_loss(model, training.validation), 5)))
            say(f"step {step} of {base.steps}: validation loss {looks[-1][1]:.3f}")
            if looks[-1][1] == min(loss for _, loss in looks):
                best = {name: value.clone() for name, value in model.state_dict().items()}
    return best, looks


def schedule(step: int, settings: Any) -> float:
    """The share of the rate in a step: up over the warm-up, then down to zero in a line."""
    warmup: int = settings.warmup_steps
    steps: int = settings.steps
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def _train_tokenizer(text: str, vocabulary: int, path: Path) -> None:
    """Byte-level BPE: any text can be encoded, of whatever kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.save(str(path))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
