# SPDX-License-Identifier: Apache-2.0
"""diffusers: two styles for one UNet, trained by denoising, then switched exactly.

Each style is an adapter of the attention's linear layers and of the ResNet blocks' convolutions
(SHiRA adapts both). One learns pictures with stripes that run down, the other stripes that run
across. Both are saved, loaded onto a fresh UNet by `Switch`, and exchanged there: each gives the
outputs of the training run bit for bit, and without them the UNet is the one of before.

Run it:   python examples/diffusers_unet.py [FOLDER]   (without one, files go to a temporary one)
Needs:    pip install 'shira[peft]' diffusers
Takes:    about 8 seconds on two CPU cores
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from shira import ShiraConfig, Switch, get_peft_model

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())


def fresh_unet():  # yours would be UNet2DConditionModel.from_pretrained(...)
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


lines = (torch.arange(8) // 2 % 2 * 2 - 1).float()  # -1 -1 1 1 -1 -1 1 1
pictures = {"down": lines.expand(16, 4, 8, 8), "across": lines[:, None].expand(16, 4, 8, 8)}
prompt = torch.randn(1, 3, 16).expand(16, 3, 16)  # where a text encoder's states would be
scheduler = DDPMScheduler(num_train_timesteps=100)


def denoising_loss(unet, clean):
    """How far the UNet is from telling the noise in noisy pictures."""
    noise = torch.randn_like(clean)
    times = torch.randint(100, (len(clean),))
    noisy = scheduler.add_noise(clean, noise, times)
    return (unet(noisy, times, prompt).sample - noise).square().mean()


unet = fresh_unet()
before = [(weight, weight.detach().clone()) for weight in unet.parameters()]
targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
model = get_peft_model(
    unet, ShiraConfig(density=0.05, target_modules=targets, random_seed=0), adapter_name="down"
)
model.add_adapter("across", ShiraConfig(density=0.05, target_modules=targets, random_seed=1))
model.print_trainable_parameters()

inputs = torch.randn(16, 4, 8, 8), 50, prompt
trained = {}
for style, clean in pictures.items():
    model.set_adapter(style)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(40):
        loss = denoising_loss(model, clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"{style}: loss {first:.3f} in the first steps, {last:.3f} in the last")
    assert last < first
    with torch.no_grad():
        trained[style] = model(*inputs).sample
model.save_pretrained(folder)  # a folder for each adapter
assert all(torch.equal(weight, old) for weight, old in before)

# Where pictures are made: the UNet alone, and the adapters' files.
plain = fresh_unet().requires_grad_(False)  # torch multiplies weights that want gradients otherwise
before = [(weight, weight.detach().clone()) for weight in plain.parameters()]
with torch.no_grad():
    base = plain(*inputs).sample
    switch = Switch(plain)
    for style in pictures:
        switch.load(style, folder / style)
    for style in ("across", "down", "across", "down"):
        switch.activate(style)
        assert torch.equal(plain(*inputs).sample, trained[style])
    print("switched four times: the outputs of training, bit for bit")
    switch.activate({"across": 0.5, "down": 0.5})  # a mixture
    assert not torch.equal(plain(*inputs).sample, base)
    switch.deactivate()
    assert torch.equal(plain(*inputs).sample, base)
assert all(torch.equal(weight, old) for weight, old in before)
print(f"saved: {folder}/down, {folder}/across; the UNet: the same bits as before")
