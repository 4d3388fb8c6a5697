# SPDX-License-Identifier: Apache-2.0
"""`AdapterBatching` around transformers' own manager, on a tiny Llama."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from shira import Adapter, ShiraConfig, Switch, get_peft_model
from shira.errors import AdapterError, ConfigError, MissingDependencyError, UnknownAdapterError
from shira.serve.continuous_batching import AdapterBatching

PROMPTS = [[5, 9, 3, 40, 21, 7] * 6 + [n] for n in (1, 2, 3)]  # one long common beginning
NEW = 8


def plain_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


@pytest.fixture(scope="module")
def model():
    base = plain_model()
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    model = get_peft_model(base, ShiraConfig(r=4, target_modules=targets, random_seed=0), "fr")
    model.add_adapter("de", ShiraConfig(r=4, target_modules=targets, random_seed=1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".shira_weight." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens of each prompt by the base and by each adapter, from ``generate``."""
    from transformers import GenerationConfig

    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    answers = {}
    for name in (None, "fr", "de"):
        if name:
            model.merge_adapter([name])
        with model.disable_adapter() if name is None else torch.no_grad():
            answers[name] = [
                model.generate(input_ids=torch.tensor([p]), generation_config=greedy)[
                    0, len(p) :
                ].tolist()
                for p in PROMPTS
            ]
        if name:
            model.unmerge_adapter()
    assert answers["fr"] != answers["de"] != answers[None]
    return answers


@contextmanager
def running(base):
    """transformers' manager of a model, greedy."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        num_blocks=64, page_size=32, max_batch_tokens=256, use_cuda_graph=False
    )
    with base.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=config, warmup=False
    ) as manager:
        yield manager


@pytest.fixture
def batching(model):
    with running(model.get_base_model()) as manager:
        yield AdapterBatching(manager, model)
    if any(getattr(module, "merged", False) for module in model.modules()):
        model.unmerge_adapter()
    model.base_model.enable_adapter_layers()


def collect(batching, requests, seconds=30):
    done, end = {}, time.monotonic() + seconds
    while len(done) < len(requests) and time.monotonic() < end:
        result = batching.manager.get_result(timeout=0.2)
        if result is not None and result.is_finished():
            assert result.error is None
            done[result.request_id] = list(result.generated_tokens)
    return [done[request] for request in requests]


def test_every_answer_is_that_of_the_adapter_switched_to(batching, expected):
    batching.switch(None)
    for selection in (None, "fr", "de", {"fr": 1.0}, None):
        batching.switch(selection)
        name = next(iter(selection)) if isinstance(selection, dict) else selection
        assert collect(batching, batching.add_requests(PROMPTS)) == expected[name]


def test_without_the_reset_the_answers_would_be_stale(batching, expected, monkeypatch):
    batching.switch("fr")
    assert collect(batching, batching.add_requests(PROMPTS)) == expected["fr"]
    monkeypatch.setattr(batching, "_reset_cache", lambda: None)
    batching.switch("de")
    assert collect(batching, batching.add_requests(PROMPTS)) != expected["de"]


def test_requests_in_flight_end_with_the_adapter_they_began_with(batching, expected):
    batching.switch("fr")
    before = batching.add_requests(PROMPTS)
    late = []
    threads = [threading.Thread(target=batching.switch, args=("de",))]
    threads.append(threading.Thread(target=lambda: late.extend(batching.add_requests(PROMPTS))))
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    answers = collect(batching, before + late)
    assert answers == expected["fr"] + expected["de"]


def test_errors_leave_the_adapter_that_was_active(batching, expected):
    batching.switch("fr")
    with pytest.raises(UnknownAdapterError, match="fr"):
        batching.switch("french")
    with pytest.raises(AdapterError, match="scale"):
        batching.switch({"de": 0.5})
    assert collect(batching, batching.add_requests(PROMPTS)) == expected["fr"]
    batching.add_request(PROMPTS[0], max_new_tokens=150)
    with pytest.raises(TimeoutError, match="nothing was switched"):
        batching.switch("de", timeout=0.0)


def test_with_a_switch(model, expected):
    base = plain_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    switch = Switch(base)
    for name in ("fr", "de"):
        switch.load(name, Adapter.from_model(model, name))
    with running(base) as manager:
        batching = AdapterBatching(manager, switch)
        for name in ("fr", "de", None, "de"):
            batching.switch(name)
            assert collect(batching, batching.add_requests(PROMPTS)) == expected[name]
        with pytest.raises(UnknownAdapterError, match="es"):
            batching.switch("es")
        assert collect(batching, batching.add_requests(PROMPTS)) == expected["de"]
        batching.switch(None)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


class Recording:
    def __init__(self):
        self.calls = []

    def activate(self, selection):
        self.calls.append(selection)

    def deactivate(self):
        self.calls.append(None)


def test_anything_with_activate_and_deactivate_will_do(batching):
    switch = Recording()
    other = AdapterBatching(batching.manager, switch)
    other.switch({"fr": 0.5, "de": 2.0})
    other.switch(None)
    assert switch.calls == [{"fr": 0.5, "de": 2.0}, None]


def test_what_cannot_be_used_is_refused():
    with pytest.raises(MissingDependencyError, match="transformers"):
        AdapterBatching(object(), Recording())
    with pytest.raises(AdapterError, match="merge_adapter"):
        AdapterBatching(type("Manager", (), {"pause": None})(), object())


@pytest.mark.parametrize("timeout", [float("nan"), -1.0])
def test_a_timeout_that_is_none(timeout):
    manager = SimpleNamespace(pause=None)
    batching = AdapterBatching(manager, SimpleNamespace(activate=lambda selection: None))
    with pytest.raises(ConfigError, match="timeout"):
        batching.switch("fr", timeout=timeout)
