# SPDX-License-Identifier: Apache-2.0
"""Rows of base models: architectures, dtypes, quantized weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.reach.case import Case, row
from tests.tuner.models import llama, t5
from tests.tuner.quantizers import QUANTIZERS

KIND = "Bases"
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


@row(KIND, "a decoder (Llama)")
def decoder() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    return Case(llama, lambda model: model(ids).logits, ATTENTION)


@row(KIND, "a decoder in bfloat16")
def decoder_in_bfloat16() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    build = lambda: llama().bfloat16()  # noqa: E731
    return Case(build, lambda model: model(ids).logits, ATTENTION)


@row(KIND, "an encoder and a decoder (T5)")
def encoder_and_decoder() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    call = lambda model: model(input_ids=ids, decoder_input_ids=ids).logits  # noqa: E731
    return Case(t5, call, {"target_modules": ["q", "v"]})


@row(KIND, "an encoder with a classification head (BERT)")
def encoder() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    ids = torch.randint(0, 64, (4, 8))
    targets = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    build = lambda: BertForSequenceClassification(config).eval()  # noqa: E731
    return Case(build, lambda model: model.eval()(ids).logits, targets)


@row(KIND, "pictures (ViT)")
def pictures() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    x = torch.randn(4, 3, 8, 8)
    build = lambda: ViTForImageClassification(config).eval()  # noqa: E731
    names = next(
        names
        for names in (["q_proj", "v_proj"], ["query", "value"])
        if any(path.endswith(names[0]) for path, _ in build().named_modules())
    )
    return Case(build, lambda model: model(x).logits, {"target_modules": names})


@row(KIND, "a UNet of diffusers", "diffusers")
def unet() -> Case:
    from diffusers import UNet2DConditionModel

    build = partial(
        UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 50]), torch.randn(2, 3, 8)
    targets = {"target_modules": ["to_q", "to_v", "conv1"]}
    return Case(build, lambda model: model(*inputs).sample, targets)


@row(KIND, "a diffusion transformer of diffusers (DiT)", "diffusers")
def dit() -> Case:
    from diffusers import DiTTransformer2DModel

    build = partial(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 50]),
        "class_labels": torch.tensor([1, 2]),
    }
    targets = {"target_modules": ["to_q", "to_v"]}
    return Case(build, lambda model: model.eval()(**inputs).sample, targets)


def quantized(how: str) -> Case:
    x = torch.randn(16, 64)

    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        QUANTIZERS[how][1](model, ["0"])
        return model

    return Case(build, lambda model: model(x), {"target_modules": ["0"]}, merges=False)


for name, (package, _) in QUANTIZERS.items():
    if package is not None:
        row(KIND, f"quantized: {name}", package)(partial(quantized, name))
