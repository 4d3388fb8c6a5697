# SPDX-License-Identifier: Apache-2.0
"""A small UNet of diffusers: convolutions and attention, scales, and the base afterwards."""

from __future__ import annotations

import peft
import pytest
import torch

from shira import ShiraConfig, ShiraLayer, Switch
from shira.errors import AdapterError

from .models import base_weights, mlp, randomize, same_weights

diffusers = pytest.importorskip("diffusers")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@pytest.mark.filterwarnings("ignore")
def test_unet():
    model = unet()
    before = base_weights(model)
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 3, 8))
    base = model(*inputs).sample
    model.add_adapter(ShiraConfig(density=0.1, target_modules=["to_q", "to_v", "conv1"]))
    randomize(model)
    kinds = {type(m.get_base_layer()) for m in model.modules() if isinstance(m, ShiraLayer)}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d}
    adapted = model(*inputs).sample
    adapted.square().sum().backward()
    trained = [p for n, p in model.named_parameters() if "shira_weight" in n]
    assert all(p.grad is not None for p in trained)
    model.set_adapters(["default"], [0.5])
    half = model(*inputs).sample
    assert not torch.equal(half, adapted)
    assert not torch.equal(half, base)
    model.disable_adapters()
    assert torch.equal(model(*inputs).sample, base)
    assert same_weights(base_weights(model), before)


# ---------------------------------------------------------------------------------------- pipelines

PROMPT = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))


def vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


def with_unet():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=32, num_hidden_layers=1, bos_token_id=0, eos_token_id=1, **sizes
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=None,
        unet=unet().eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def with_transformer():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return diffusers.DiTPipeline(transformer=transformer.eval(), vae=vae(), scheduler=scheduler)


def picture(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    what = {"class_labels": [1]}
    if hasattr(pipe, "unet"):
        what = {"prompt_embeds": PROMPT, "negative_prompt_embeds": torch.zeros_like(PROMPT)}
    noise = torch.Generator().manual_seed(0)
    made = pipe(**what, generator=noise, num_inference_steps=2, output_type="pt", **options)
    return made.images if isinstance(made.images, torch.Tensor) else torch.from_numpy(made.images)


CONFIG = {"density": 0.1, "target_modules": ["to_q", "to_v"], "init_weights": False}
PIPELINES = [(with_unet, "unet"), (with_transformer, "transformer")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "part"), PIPELINES)
def test_a_pipeline_is_switched_at_any_strength(build, part, tmp_path):
    pipe = build()
    if part == "transformer":  # its pipeline knows "pt" as nothing, and gives numpy's then
        pipe.numpy_to_pil = lambda images: images
    base = picture(pipe)
    model = peft.get_peft_model(getattr(pipe, part), ShiraConfig(random_seed=0, **CONFIG), "one")
    one = picture(pipe)
    assert not torch.equal(one, base)
    model.save_pretrained(tmp_path)
    for layer in model.modules():
        if isinstance(layer, ShiraLayer):
            layer.set_scale("one", 0.5)
    half = picture(pipe)

    plain = build()
    before = base_weights(getattr(plain, part))
    switch = Switch(getattr(plain, part))
    switch.load("one", tmp_path / "one")
    for strength, wanted in ((1.0, one), (0.5, half), (0.0, base), (0.5, half), (1.0, one)):
        switch.activate({"one": strength})
        assert torch.equal(picture(plain), wanted)
    switch.deactivate()
    assert torch.equal(picture(plain), base)
    assert same_weights(base_weights(getattr(plain, part)), before)


@pytest.mark.filterwarnings("ignore")
def test_the_calls_of_diffusers(tmp_path):
    pipe = with_unet()
    before, base = base_weights(pipe.unet), picture(pipe)
    pipe.unet.add_adapter(ShiraConfig(random_seed=0, **CONFIG), "one")
    one = picture(pipe)
    half = picture(pipe, cross_attention_kwargs={"scale": 0.3})
    assert not torch.equal(half, one)
    assert torch.equal(picture(pipe), one)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(picture(pipe), one)
    pipe.unet.set_adapters(["one"], [0.3])
    assert torch.equal(picture(pipe), half)
    pipe.unet.set_adapters(["one"], [1.0])
    pipe.unet.fuse_lora(lora_scale=0.3)
    assert torch.equal(picture(pipe), half)
    pipe.unet.unfuse_lora()
    assert same_weights(base_weights(pipe.unet), before)
    pipe.unet.set_adapters(["one"], [1.0])
    pipe.unet.disable_lora()
    assert torch.equal(picture(pipe), base)
    pipe.unet.enable_lora()
    peft.save_as_lora(tmp_path, pipe.unet, rank=1.0, adapter_name="one")
    pipe.unet.delete_adapters("one")
    assert torch.equal(picture(pipe), base)
    pipe.unet.unload_lora()
    assert same_weights(base_weights(pipe.unet), before)
    pipe.unet.load_lora_adapter(tmp_path, prefix=None, weight_name="adapter_model.safetensors")
    torch.testing.assert_close(picture(pipe), one, rtol=1e-3, atol=1e-3)


def test_factors_are_put_back_as_they_were():
    model = peft.get_peft_model(mlp(), ShiraConfig(r=1, target_modules=["lin1"], random_seed=0))
    layer = model.base_model.model.lin1
    layer.set_scale("default", 0.1)
    for scale in (0.3, 0.7):
        layer.scale_layer(scale)
    assert layer.scaling["default"] == 0.1 * 0.3 * 0.7
    for scale in (0.7, 0.3):
        layer.unscale_layer(scale)
    assert layer.scaling["default"] == 0.1
    layer.unscale_layer(0.5)  # by which nothing was multiplied
    assert layer.scaling["default"] == 0.2
    layer.unscale_layer()
    assert layer.scaling["default"] == 1.0
    with pytest.raises(AdapterError, match="finite"):
        layer.scale_layer(float("nan"))
    with pytest.raises(AdapterError, match="cannot be divided by"):
        layer.unscale_layer(0.0)
    assert layer.scaling["default"] == 1.0


def test_factors_that_grow_too_large_change_none() -> None:
    model = peft.get_peft_model(mlp(), ShiraConfig(r=1, target_modules=["lin1"], random_seed=0))
    model.add_adapter("two", ShiraConfig(r=1, target_modules=["lin1"], random_seed=1))
    model.base_model.set_adapter(["default", "two"])
    layer = model.base_model.model.lin1
    layer.set_scale("two", 1e300)
    with pytest.raises(AdapterError, match=r"'two' is a finite number"):
        layer.scale_layer(1e300)
    assert layer.scaling == {"default": 1.0, "two": 1e300}
