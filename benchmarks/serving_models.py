# SPDX-License-Identifier: Apache-2.0
"""What the serving suite serves: a random Llama, SHiRA and LoRA adapters for it, right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_base(folder: Path, *, hidden: int, layers: int, vocab: int, length: int) -> Path:
    """A random checkpoint whose next token is never nearly a tie."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=length,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def targets(base: Path) -> dict[str, tuple[int, int]]:
    """Shape by name of every adapted weight."""
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "pt") as file:
        return {
            name: tuple(file.get_slice(name).get_shape())
            for name in sorted(file.keys())
            if name.split(".")[-2] in TARGETS
        }


def save_shira(folder: Path, base: Path, r: int, seed: int) -> dict[str, Tensor]:
    """r * (m + n) random entries of each target; returns the merged targets."""
    from safetensors import safe_open

    from shira.adapter import Adapter
    from shira.delta import SparseDelta
    from shira.masks import random_support

    generator = torch.Generator().manual_seed(seed)
    deltas, merged = {}, {}
    with safe_open(base / "model.safetensors", "pt") as file:
        for name, shape in targets(base).items():
            support = random_support(shape, r * sum(shape), seed=seed, name=name)
            delta = SparseDelta(support, 0.5 * torch.randn(support.nnz, generator=generator))
            deltas[name] = delta
            weight = file.get_tensor(name)
            flat = weight.view(-1)
            at = support.indices.long()
            flat[at] = delta.replacement(flat[at])
            merged[name] = weight
    Adapter(deltas).save(folder, format="peft")
    return merged


def save_lora(folder: Path, base: Path, r: int, seed: int) -> None:
    """As many values in LoRA, in PEFT's format, which vLLM reads."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n) in targets(base).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(r, n, generator=generator) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(m, r, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def greedy(
    base: Path, merged: dict[str, Tensor], prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    """What transformers generates with these weights in place of the base's."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in merged.items():
            parameters[name].copy_(weight)
        ids = torch.tensor(prompts)
        config = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
            eos_token_id=[],
        )  # fmt: skip
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
    answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return answers
