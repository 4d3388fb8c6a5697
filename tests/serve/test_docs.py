# SPDX-License-Identifier: Apache-2.0
"""The Python of docs/serving.md that needs no vLLM; engine/test_docs.py beside it runs the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from shira import Adapter, ShiraConfig, get_peft_model
from tests.pages import DOCS, blocks
from tests.serve.test_continuous_batching import NEW, PROMPTS, plain_model

PAGE = DOCS / "serving.md"
NAMES = ["french", "german"]


def block(word: str) -> str:
    (found,) = [block for block in blocks(PAGE, "python") if word in block]
    return found


@pytest.fixture
def model():
    targets = ["q_proj", "down_proj"]
    model = get_peft_model(plain_model(), ShiraConfig(r=4, target_modules=targets), NAMES[0])
    model.add_adapter(NAMES[1], ShiraConfig(r=4, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".shira_weight." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_every_block_is_run_here_or_with_vllm():
    code = blocks(PAGE, "python")
    with_vllm = [block for block in code if "Client" in block or "client." in block]
    here = [block(word) for word in ("AdapterBatching", "adapter_names=", "add_products")]
    assert sorted(code) == sorted(with_vllm + here)


def test_continuous_batching(model, tmp_path, monkeypatch):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    (tmp_path / "adapters").mkdir()
    for name in NAMES:
        Adapter.from_model(model, name).save(tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    plain = plain_model()
    small = ContinuousBatchingConfig(
        num_blocks=64, page_size=32, max_batch_tokens=256, use_cuda_graph=False
    )
    plain.continuous_batching_context_manager = partial(
        plain.continuous_batching_context_manager,
        continuous_batching_config=small,
        warmup=False,
    )
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    namespace = {"model": plain, "config": config, "tokens": PROMPTS[0]}
    exec(compile(block("AdapterBatching"), str(PAGE), "exec"), namespace)
    assert namespace["answer"].request_id == namespace["request"]
    model.merge_adapter(["french"])
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    ids = torch.tensor(PROMPTS[:1])
    expected = model.generate(input_ids=ids, generation_config=greedy)[0, ids.shape[1] :]
    assert list(namespace["answer"].generated_tokens) == expected.tolist()


def test_mixed_batches(model):
    tokens = torch.tensor(PROMPTS[:1] * 4)
    namespace = {"model": model, "tokens": tokens}
    with torch.no_grad():
        exec(compile(block("adapter_names="), str(PAGE), "exec"), namespace)
        mixed = namespace["mixed"].logits
        each = {}
        for name in NAMES:
            model.set_adapter(name)
            each[name] = model(input_ids=tokens[:1]).logits[0]
        with model.disable_adapter():
            each["__base__"] = model(input_ids=tokens[:1]).logits[0]
    for got, name in zip(mixed, ["french", "german", "__base__", "french"], strict=True):
        torch.testing.assert_close(got, each[name])
    assert not torch.allclose(each["french"], each["german"])


def test_a_product_of_your_own():
    namespace = {}
    exec(compile(block("add_products"), str(PAGE), "exec"), namespace)
    assert namespace["product"].tolist() == [[5, 0], [0, 0], [0, -5]]
