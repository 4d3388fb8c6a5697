# SPDX-License-Identifier: Apache-2.0
"""A sample of the sweep: a model class of each kind."""

from __future__ import annotations

import pytest

from tests.sweep.one import Work

TRANSFORMERS = [
    "BartModel",  # scaled embeddings, positions with a forward of their own
    "BertModel",
    "BitModel",  # convolutions that standardize their weight
    "CLIPModel",
    "DeepseekV4Model",  # grouped linear layers, experts
    "LlamaForCausalLM",
    "MambaModel",  # reads the weight of dt_proj
    "MixtralModel",
    "T5ForConditionalGeneration",
    "ViTModel",
    "Wav2Vec2Model",
    "WhisperModel",  # asks an embedding for its size
]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    row = Work("transformers")(name)
    assert row["verdict"] == "right", row["detail"]
    assert row["layers"]


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "UNet2DConditionModel"])
def test_diffusers(name):
    pytest.importorskip("diffusers")
    row = Work("diffusers")(name)
    assert row["verdict"] == "right", row["detail"]
    assert row["layers"]


def test_timm():
    pytest.importorskip("timm")
    row = Work("timm")("resnet:test_resnet")
    assert row["verdict"] == "right", row["detail"]
    assert row["layers"]
