# SPDX-License-Identifier: Apache-2.0
"""A tiny model, two adapters for it, and what transformers answers with each merged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shira.adapter import Adapter
from shira.base import fingerprint
from shira.delta import SparseDelta
from shira.masks import random_support

EXTENSION = "shira.serve.vllm.ShiraWorkerExtension"
SIZES = {
    "vocab_size": 250,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # so that no two tokens are nearly as likely
}
ENGINE = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": True,
}
PROMPTS = [[3 + (7 * i + 11 * j * j) % 240 for j in range(140)] for i in range(3)]
TOKENS = 8


def save_model(folder: Path, kind: str = "Llama", dtype=torch.float32, **changes) -> Path:
    """A random model of transformers' class, saved as a checkpoint."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    model.save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def make_adapter(base: dict[str, torch.Tensor], seed: int, names=None) -> Adapter:
    """Random deltas, large enough to change what is generated, on 3 % of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    deltas, marks = {}, {}
    for name, weight in base.items():
        if weight.dim() < 2 or (names is not None and name not in names):
            continue
        support = random_support(tuple(weight.shape), weight.numel() // 33, seed=seed, name=name)
        deltas[name] = SparseDelta(
            support, 0.5 * torch.randn(support.nnz, generator=generator, dtype=torch.float32)
        )
        marks[name] = fingerprint(weight.reshape(-1)[support.indices.long()])
    return Adapter(deltas, {"base_fingerprint": marks})


def merged(base: dict[str, torch.Tensor], *terms: tuple[Adapter, float]) -> dict[str, torch.Tensor]:
    """The base with adapters in it: deltas summed in float32 in order, rounded once."""
    out = {name: weight.clone() for name, weight in base.items()}
    for name, weight in out.items():
        total = torch.zeros(weight.numel(), dtype=torch.float32)
        for adapter, scale in terms:
            if name in adapter:
                delta = adapter[name]
                total[delta.support.indices.long()] += delta.values.float() * scale
        out[name] = (weight.float().reshape(-1) + total).to(weight.dtype).view_as(weight)
    return out


def save_merged(folder: Path, base: Path, weights: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (base / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def answers(folder: Path) -> list[tuple[list[int], list[float]]]:
    """What transformers generates greedily: tokens and their log-probabilities."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for prompt in PROMPTS:
        tokens, logprobs = list(prompt), []
        for _ in range(TOKENS):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1]
            best = int(logits.argmax())
            logprobs.append(float(logits.log_softmax(-1)[best]))
            tokens.append(best)
        out.append((tokens[len(prompt) :], logprobs))
    return out


@dataclass
class Zoo:
    """A base, adapters and combinations of them on disk, and the right answers by state."""

    root: Path
    base: Path
    weights: dict[str, torch.Tensor]
    adapters: dict[str, Adapter]
    states: dict[str, dict[str, float]]
    merged: dict[str, Path] = field(default_factory=dict)
    answers: dict[str, list] = field(default_factory=dict)

    def path(self, adapter: str) -> str:
        return str(self.root / adapter)


def make_zoo(root: Path) -> Zoo:
    base = save_model(root / "llama")
    weights = weights_of(base)
    adapters = {"a": make_adapter(weights, 1), "b": make_adapter(weights, 2)}
    states = {
        "base": {},
        "a": {"a": 1.0},
        "b": {"b": 1.0},
        "half": {"a": 0.5},
        "both": {"a": 0.7, "b": -0.3},
    }
    zoo = Zoo(root, base, weights, adapters, states)
    for name, adapter in adapters.items():
        adapter.save(root / name, format="peft")
    for state, terms in states.items():
        inside = merged(weights, *((adapters[name], scale) for name, scale in terms.items()))
        zoo.merged[state] = save_merged(root / f"merged-{state}", base, inside)
        zoo.answers[state] = answers(zoo.merged[state])
    tokens = {state: [t for t, _ in each] for state, each in zoo.answers.items()}
    assert len({json.dumps(t) for t in tokens.values()}) == len(states), "states answer alike"
    return zoo
