# SPDX-License-Identifier: Apache-2.0
"""Merging on disk beside loading a model, merging in memory and saving it; and its memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from shira import Adapter, ShiraConfig, SparseDelta, Support, get_peft_model
from shira.convert import merge, unmerge
from tests.convert.conftest import digests


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_files_of_a_model_merged_in_memory_and_saved(tmp_path, dtype, scale):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    base, adapted = tmp_path / "base", tmp_path / "adapter"
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "first")

    def load(path=base):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    # What was loaded is saved in another order than a new model, so that a second time is needed.
    load(tmp_path / "first").save_pretrained(base, max_shard_size="12KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    options = {"r": 4, "target_modules": "all-linear", "random_seed": 3}
    model = get_peft_model(load(), ShiraConfig(**options), autocast_adapter_dtype=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(adapted)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    saved = load()  # unloading puts the modules in another order, and so other ones in a shard
    saved.load_state_dict(model.merge_and_unload().state_dict())
    saved.save_pretrained(tmp_path / "memory", max_shard_size="12KB")

    merge(adapted, base, tmp_path / "disk", scale=scale, undo=tmp_path / "undo")
    on_disk, in_memory = digests(tmp_path / "disk"), digests(tmp_path / "memory")
    assert on_disk == in_memory  # config and index too
    assert on_disk != digests(base)
    unmerge(tmp_path / "disk", tmp_path / "undo", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(base)


MEASURED = """
import json, re, sys
from pathlib import Path
from shira import Adapter
from shira.convert import merge, unmerge
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
adapter, base, small = Adapter.load(sys.argv[1]), *sys.argv[2:4]
def run(base, name, adapter):
    merge(adapter, base, name, undo=name + ".undo")
    unmerge(name, name + ".undo", name + ".back")
run(small, sys.argv[4] + "/small", Adapter({"w": adapter["small.weight"]}))  # first use
Path("/proc/self/clear_refs").write_text("5")
before = peak()
run(base, sys.argv[4] + "/large", Adapter({"w": adapter["w.weight"]}))
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_adapter_not_of_the_largest_tensor(tmp_path):
    """A tensor of 96 MB, an adapter of 20,000 entries (0.24 MB)."""
    k = 20_000
    torch.manual_seed(0)
    save_file({"w": torch.randn(6000, 8000).bfloat16()}, tmp_path / "large.safetensors")
    save_file({"w": torch.randn(60, 80).bfloat16()}, tmp_path / "small.safetensors")
    flat = torch.randint(6000 * 8000, (k,)).unique()
    large = SparseDelta(Support((6000, 8000), flat), torch.ones(len(flat)))
    small = SparseDelta(Support((60, 80), torch.arange(0, 4800, 7)), torch.ones(686))
    Adapter({"w.weight": large, "small.weight": small}).save(tmp_path / "adapter", format="peft")
    out = subprocess.run(
        [
            *[sys.executable, "-c", MEASURED, tmp_path / "adapter"],
            *[tmp_path / "large.safetensors", tmp_path / "small.safetensors", tmp_path],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) < 24e6  # a window, some copies of the entries, the kernel's count
