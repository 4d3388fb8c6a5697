# SPDX-License-Identifier: Apache-2.0
"""Inputs for a model, from the signature of its forward and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH = 2, 12
MODALITIES = ("input_ids", "pixel_values", "input_features", "input_values")


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs to try for a transformers model, the likeliest first."""
    parameters = {
        name: p
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    required = [name for name, p in parameters.items() if p.default is p.empty]
    main = getattr(model, "main_input_name", "input_ids")
    sets = [[*required, main]]
    both = {"pixel_values", "input_ids"} <= set(parameters)
    if both:
        sets.append([*required, main, "input_ids", "pixel_values"])
    if "decoder_input_ids" in parameters:
        sets = [[*names, "decoder_input_ids"] for names in sets] + sets
    elif "decoder_inputs_embeds" in parameters and "input_ids" not in parameters:
        sets.append([*required, main])
    for name in (*MODALITIES, "inputs_embeds"):
        if name in parameters and name != main:
            sets.append([*required, name])
            if "decoder_input_ids" in parameters:
                sets.append([*required, name, "decoder_input_ids"])
    kinds = [name for name in MODALITIES if name in parameters]
    if len(kinds) > 1:
        sets.append([*required, *kinds])
    if "bbox" in parameters:
        sets = [[*names, "bbox"] for names in sets] + sets
    if "attention_mask" in parameters:
        sets += [[*names, "attention_mask"] for names in sets]
    seen = set()
    for names in sets:
        names = [name for name in dict.fromkeys(names) if name in parameters]
        if tuple(names) in seen:
            continue
        seen.add(tuple(names))
        makers = {name: MAKERS.get(name) for name in names}
        missing = [name for name, maker in makers.items() if maker is None]
        if missing:
            raise KeyError(f"no rule for the input {missing[0]!r}")
        made = {name: maker(model) for name, maker in makers.items() if maker is not None}
        made = {name: one if isinstance(one, list) else [one] for name, one in made.items()}
        for variant in range(max(len(one) for one in made.values())):
            yield {name: one[min(variant, len(one) - 1)] for name, one in made.items()}


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator)


def find(model: nn.Module, *names: str, default: Any = None) -> Any:
    """The first value of one of these names in the configuration or a nested one."""
    pending = [model.config]
    while pending:
        config = pending.pop(0)
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
        pending += [v for v in vars(config).values() if hasattr(v, "to_dict")]
    return default


def _ids(model: nn.Module) -> list[Tensor]:
    try:
        vocab = model.get_input_embeddings().num_embeddings
    except Exception:
        vocab = find(model, "vocab_size", default=64)
    special = {
        value
        for config in [model.config, *vars(model.config).values()]
        if hasattr(config, "to_dict")
        for key, value in vars(config).items()
        if key.endswith(("_id", "_index")) and isinstance(value, int)
    }
    usual = [i for i in range(3, min(int(vocab), 500)) if i not in special] or [0]
    places = torch.arange(BATCH * LENGTH) * 7 % len(usual)
    ids = torch.tensor(usual)[places].reshape(BATCH, LENGTH)
    end = find(model, "eos_token_id")
    if isinstance(end, int) and 0 <= end < int(vocab):
        ids[:, -1] = end
    choices = ids[:, None].expand(-1, 2, -1).contiguous()
    return [choices] if "MultipleChoice" in type(model).__name__ else [ids]


def _decoder_ids(model: nn.Module) -> Tensor:
    decoder = getattr(model.config, "decoder", None)
    vocab = getattr(decoder, "vocab_size", None) or find(model, "decoder_vocab_size", "vocab_size")
    return 4 + torch.arange(BATCH * 6).reshape(BATCH, 6) * 5 % (min(int(vocab), 500) - 5)


def _pixels(model: nn.Module) -> list[Tensor]:
    if _takes(model, "grid_thw"):
        patch = find(model, "patch_size", default=14)
        depth = find(model, "temporal_patch_size", default=1)
        channels = find(model, "in_channels", "in_chans", "num_channels", default=3)
        widths = [channels * depth * patch**2, channels * patch**2]
        return [_normal(BATCH * 16, width) for width in widths]
    size = find(model, "image_size", "input_size", "img_size", "crop_size", default=64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if isinstance(size, dict):
        height, width = size["height"], size["width"]
    channels = find(model, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = find(model, "num_frames", default=2)
    images = [_normal(BATCH, channels, side, side) for side in (64, 128)]
    return [
        _normal(BATCH, channels, height, width),
        *images,
        _normal(BATCH, frames, channels, height, width),
        _normal(BATCH, 1, 3, 224, 224),
    ]


def _features(model: nn.Module) -> list[Tensor]:
    mels = find(model, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim",
                "feature_size", "n_mels", "input_dim", default=80)  # fmt: skip
    frames = 2 * int(find(model, "max_source_positions", default=50))
    return [
        _normal(BATCH, mels, frames),
        _normal(BATCH, 64, mels),
        _normal(BATCH, 1, 1024, mels),
        _normal(BATCH, 1, 64, mels),
        _normal(BATCH, mels, 3000),
    ]


def _audio(model: nn.Module) -> list[Tensor]:
    channels = find(model, "audio_channels", default=1)
    channels = channels if isinstance(channels, int) else 1
    return [
        _normal(BATCH, 4000),
        _normal(BATCH, channels, 4800),
        _normal(BATCH, 1024, find(model, "num_mel_bins", default=128)),
        _normal(BATCH, 1, 9600),
    ]


def _ones(length: int):  # type: ignore[no-untyped-def]
    return lambda model: torch.ones(BATCH, length, dtype=torch.long)


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _embeds(model: nn.Module) -> list[Tensor]:
    if _takes(model, "grid_thw"):
        return _pixels(model)
    width = find(model, "hidden_size", "d_model", "n_embd", "dim", default=32)
    return [_normal(BATCH, LENGTH, width)]


def _boxes(model: nn.Module) -> Tensor:
    return (torch.arange(BATCH * LENGTH * 4).reshape(BATCH, LENGTH, 4) % 5).sort(-1).values


MAKERS: dict[str, Any] = {
    "input_ids": _ids,
    "decoder_input_ids": _decoder_ids,
    "attention_mask": _ones(LENGTH),
    "pixel_values": _pixels,
    "pixel_values_videos": lambda m: [
        p[:, None].expand(-1, find(m, "frames_per_clip", "num_frames", default=2), -1, -1, -1)
        if p.ndim == 4
        else p
        for p in _pixels(m)
    ],
    "input_features": _features,
    "input_values": _audio,
    "audio_values": _audio,
    "audio": _audio,
    "waveform": _audio,
    "inputs_embeds": _embeds,
    "hidden_states": _embeds,
    "encoder_hidden_states": _embeds,
    "query_embeds": _embeds,
    "bbox": _boxes,
    "grid_thw": lambda model: torch.tensor([[1, 4, 4]] * BATCH),
    "input_features_mask": _ones(64),
    "inputs": lambda m: [*_ids(m), *_pixels(m)],
    "spectrogram": lambda m: [
        _normal(BATCH, 50, find(m, "model_in_dim", "num_mel_bins", default=80))
    ],
    "past_values": lambda m: [
        _normal(
            BATCH,
            find(m, "context_length", default=64) or 64,
            find(m, "num_input_channels", default=1),
        )
    ],
}
