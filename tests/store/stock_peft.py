# SPDX-License-Identifier: Apache-2.0
"""Stock PEFT's side of an exchange of files, run in a process without shira (`program`).

``write FOLDER`` saves a model's base, inputs, outputs and an adapter made by PEFT itself.
``load FOLDER ADAPTER OUT`` loads an adapter onto that base and saves the outputs.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn


def base_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9), nn.Linear(9, 4))


def write(folder: Path) -> None:
    base = base_model()
    save_file({k: v.clone() for k, v in base.state_dict().items()}, folder / "base.safetensors")
    config = ShiraConfig(
        r=2, target_modules=["0", "2"], random_seed=5, init_weights=False, modules_to_save=["3"]
    )
    model = get_peft_model(base, config)
    base[3].modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(folder / "adapter")
    x = torch.randn(7, 12)
    deltas = {
        name: layer.get_delta_weight("default").to_dense().detach()
        for name, layer in (("0.weight", base[0]), ("2.weight", base[2]))
    }
    save_file({"x": x, "y": model(x).detach(), **deltas}, folder / "expected.safetensors")


def load(folder: Path, adapter: Path, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the fields it does not know
        model = PeftModel.from_pretrained(base_model(), adapter)
    x = load_file(folder / "expected.safetensors")["x"]
    save_file({"y": model(x).detach()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"write": write, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:]))
    assert "shira" not in sys.modules
