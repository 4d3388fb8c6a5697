# SPDX-License-Identifier: Apache-2.0
"""Three adapters switched on a device that has torch and safetensors, and nothing else.

`shira.switch` needs neither PEFT nor transformers. Here the base is a checkpoint (safetensors), the
model a plain ``nn.Module``, and the adapters compact files of one to three bytes a parameter. They
are put into the weights, exchanged and taken out in place; every state is compared, bit for bit,
with the sum that it stands for.

Run it:   python examples/edge_switching.py [FOLDER]   (without one the files go to a temporary one)
Needs:    pip install shira
Takes:    a second or two on two CPU cores
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shira import Adapter, SparseDelta, Switch
from shira.masks import random_support

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)


def network():
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).bfloat16()


# What somebody else has made and the device has downloaded: a base and three adapters of it. Real
# ones are trained; these have random values at 2 % of the entries of both matrices.
torch.manual_seed(0)
save_file(network().state_dict(), folder / "base.safetensors")
for seed, name in enumerate(["night", "rain", "snow"]):
    deltas = {}
    for weight, shape in (("0.weight", (512, 256)), ("2.weight", (256, 512))):
        support = random_support(shape, k=2621, seed=seed, name=weight)
        deltas[weight] = SparseDelta(support, 0.1 * torch.randn(support.nnz))
    # A random mask's positions are its seed: the file holds the values alone.
    Adapter(deltas, {"mask_type": "random", "random_seed": seed}).save(
        folder / f"{name}.safetensors", dtype=torch.bfloat16
    )

# The device: load the base, and the adapters beside it.
model = network()
model.load_state_dict(load_file(folder / "base.safetensors"))
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
adapters = {}
switch = Switch(model)
for name in ("night", "rain", "snow"):
    path = folder / f"{name}.safetensors"
    adapters[name] = Adapter.load(path)
    switch.load(name, adapters[name])
    print(f"{name}: {adapters[name].nnz:,} entries in {path.stat().st_size:,} bytes")


def expected(scales):
    """The base with adapters in it, computed the dense way."""
    out = {name: tensor.clone() for name, tensor in base.items()}
    for weight in ("0.weight", "2.weight"):
        total = torch.zeros_like(out[weight], dtype=torch.float32)
        for name, scale in scales.items():
            delta = adapters[name][weight]
            total.view(-1)[delta.support.indices.long()] += scale * delta.values.float()
        out[weight] = (out[weight].float() + total).bfloat16()  # summed in float32, rounded once
    return out


def same_bits(weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


places = [parameter.data_ptr() for parameter in model.parameters()]
for state in ({"night": 1.0}, {"rain": 1.0}, {"rain": 0.5, "snow": 1.0}, {"snow": 1.0}):
    switch.activate(state)
    assert same_bits(expected(state)), state
    assert not same_bits(base), state
    print(f"active: {switch.active}; every weight as expected, bit for bit")

with switch.using("night"):  # for a while
    assert same_bits(expected({"night": 1.0}))
assert same_bits(expected({"snow": 1.0}))

for turn in range(300):  # sums would have drifted by now
    switch.activate(("night", "rain", "snow")[turn % 3])
switch.deactivate()
assert same_bits(base)
assert places == [parameter.data_ptr() for parameter in model.parameters()]
print("after 300 more switches: the base, bit for bit, where it was in memory")
