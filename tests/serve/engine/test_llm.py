# SPDX-License-Identifier: Apache-2.0
"""``vllm.LLM`` with one worker and with two: answers, weights and refusals, on one engine each."""

from __future__ import annotations

import shutil
from contextlib import suppress

import pytest
import torch
from vllm import LLM, SamplingParams

from shira.adapter import Adapter
from shira.convert import merge
from shira.delta import SparseDelta
from shira.errors import (
    AdapterError,
    FileFormatError,
    ServeError,
    SwitchError,
    UnknownAdapterError,
    WrongBaseError,
)
from shira.serve.client import Client
from shira.support import Support
from tests.serve.engine.zoo import (
    ENGINE,
    EXTENSION,
    PROMPTS,
    SIZES,
    TOKENS,
    answers,
    make_adapter,
    save_model,
    weights_of,
)

pytestmark = pytest.mark.vllm
GREEDY = SamplingParams(
    max_tokens=TOKENS, temperature=0, detokenize=False, logprobs=1, ignore_eos=True
)


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def llm(request, zoo, forked):
    options = dict(ENGINE)
    patch = pytest.MonkeyPatch()
    if request.param == 2:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        options |= {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    llm = LLM(model=str(zoo.base), worker_extension_cls=EXTENSION, **options)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def client(llm, zoo):
    client = Client(llm)
    for name in zoo.adapters:
        said = client.load(name, zoo.path(name))
        assert said["nnz"] == zoo.adapters[name].nnz
        assert said["checked"] == said["parameters"] == len(zoo.adapters[name])
    return client


@pytest.fixture
def base_active(client):
    client.deactivate()
    return client


def generate(engine, prompts=PROMPTS):
    out = engine.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)
    return [
        (
            list(o.outputs[0].token_ids),
            [
                row[t].logprob
                for row, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
            ],
            o.num_cached_tokens,
        )
        for o in out
    ]


def check(engine, zoo, state):
    """Tokens as transformers', log-probabilities within 1e-5; returns cached tokens."""
    got = generate(engine)
    assert [tokens for tokens, _, _ in got] == [tokens for tokens, _ in zoo.answers[state]]
    for (_, ours, _), (_, theirs) in zip(got, zoo.answers[state], strict=True):
        assert max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) < 1e-5
    return sum(cached for _, _, cached in got)


def checksums(llm):
    return llm.collective_rpc("compute_weight_checksums")


def test_each_state_after_each_other(base_active, zoo, llm):
    client, base = base_active, checksums(llm)
    check(llm, zoo, "base")
    for state in ["a", "b", "a", "both", "half", "b", "both", "base", "a"]:
        client.activate(zoo.states[state])
        assert client.active == zoo.states[state]
        assert check(llm, zoo, state) == 0, "blocks of another state were used"
        assert check(llm, zoo, state) > 0, "the cache does not work at all"
    client.deactivate()
    assert checksums(llm) == base
    check(llm, zoo, "base")


def test_weights_are_those_that_vllm_loads_from_a_merged_checkpoint(base_active, zoo, llm):
    client, base = base_active, checksums(llm)
    ours = {}
    for state in ("a", "both"):
        client.activate(zoo.states[state])
        ours[state] = checksums(llm)
    client.deactivate()
    for state, weights in ours.items():
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(zoo.merged[state])})
        assert checksums(llm) == weights
        assert weights != base
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(zoo.base)})
    assert checksums(llm) == base
    llm.reset_prefix_cache()


def test_what_a_rank_holds(base_active, zoo, llm):
    reports = llm.collective_rpc("shira_list")
    nnz = [report["adapters"]["a"]["nnz_here"] for report in reports]
    assert sum(nnz) == zoo.adapters["a"].nnz
    assert len({report["adapters"]["a"]["digest"] for report in reports}) == 1
    before = base_active.fingerprint()
    base_active.activate("a", 2.0)
    after = base_active.fingerprint()
    for one, two in zip(before, after, strict=True):
        assert one["base"] == two["base"] == one["weights"]
        assert two["weights"] != two["base"]


def test_with_a_salt_each_state_finds_its_own_blocks_again(base_active, zoo, llm):
    llm.reset_prefix_cache()
    salted = Client(llm, cache="salt")
    for rounds in range(2):
        for state in ("a", "b", "base"):
            salted.activate(zoo.states[state])
            cached = check(salted, zoo, state)
            assert (cached > 0) == (rounds > 0)
    base_active.deactivate()


def test_using_puts_back_what_was_active(base_active, zoo, llm):
    base_active.activate("b")
    with base_active.using("a"):
        check(llm, zoo, "a")
    check(llm, zoo, "b")
    with suppress(ZeroDivisionError), base_active.using("a"):
        raise ZeroDivisionError
    check(llm, zoo, "b")


def test_no_switch_while_requests_are_unfinished(base_active, zoo, llm):
    llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], GREEDY, use_tqdm=False)
    with pytest.raises(ServeError, match="unfinished"):
        base_active.activate("a")
    (out,) = llm.wait_for_completion(use_tqdm=False)
    assert list(out.outputs[0].token_ids) == zoo.answers["base"][0][0]
    base_active.activate("a")
    check(llm, zoo, "a")


# --- refusals: a clear error, and the engine goes on with what it had ----------------------------


def corrupt(zoo, path):
    shutil.copytree(zoo.path("a"), path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def not_there(zoo, path):
    pass


def pickled(zoo, path):
    path.mkdir()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04.")


def other_base(zoo, path):
    a = zoo.adapters["a"]
    marks = dict(a.metadata["base_fingerprint"])
    marks["lm_head.weight"] = "float32:0123456789abcdef"
    Adapter(dict(a.items()), {"base_fingerprint": marks}).save(path, format="peft")


def other_names(zoo, path):
    name = "model.layers.0.self_attn.q_proj.weight"
    foreign = {name.replace("model.", "transformer."): zoo.adapters["a"][name]}
    Adapter(foreign).save(path, format="peft")


def other_shape(zoo, path):
    support = zoo.adapters["a"]["lm_head.weight"].support
    wider = type(support)((support.shape[0] * 2, support.shape[1]), support.indices)
    delta = SparseDelta(wider, torch.ones(wider.nnz))
    Adapter({"lm_head.weight": delta}).save(path, format="peft")


REFUSED = {
    "corrupt": (corrupt, FileFormatError, "safetensors"),
    "absent": (not_there, FileNotFoundError, "no such file"),
    "a pickle": (pickled, FileFormatError, "pickle"),
    "of another base": (other_base, WrongBaseError, "'lm_head.weight'"),
    "of another model": (other_names, WrongBaseError, "transformer.layers.0"),
    "of a wider model": (other_shape, WrongBaseError, "lm_head"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_that_cannot_be_meant(what, client, zoo, llm, tmp_path):
    make, error, message = REFUSED[what]
    make(zoo, tmp_path / "bad")
    client.activate("a")
    before = checksums(llm)
    with pytest.raises(error, match=message):
        client.load("bad", tmp_path / "bad")
    with pytest.raises(UnknownAdapterError, match="bad"):
        client.activate("bad")
    assert checksums(llm) == before
    assert set(client.list()["adapters"]) == set(zoo.adapters)
    check(llm, zoo, "a")


def test_what_a_caller_may_get_wrong(base_active, zoo, llm):
    client = base_active
    with pytest.raises(AdapterError, match="loaded already"):
        client.load("a", zoo.path("b"))
    with pytest.raises(AdapterError, match="finite number"):
        client.activate("a", float("nan"))
    client.activate("a")
    with pytest.raises(AdapterError, match="is active"):
        client.unload("a")
    with pytest.raises(UnknownAdapterError, match="Did you mean 'a'"):
        client.unload("aa")
    check(llm, zoo, "a")


# --- asleep --------------------------------------------------------------------------------------


def test_sleeping_and_waking(base_active, zoo, llm):
    """vLLM's CPU workers do not free memory when asleep; reloading the base is real."""
    client, base = base_active, checksums(llm)
    client.activate(zoo.states["both"])
    client.sleep(level=1)
    client.wake_up()
    check(llm, zoo, "both")
    client.sleep(level=2)
    with pytest.raises(ServeError, match="discarded"):
        client.activate("a")
    client.wake_up()
    assert client.active == zoo.states["both"]
    check(llm, zoo, "both")
    client.deactivate()
    assert checksums(llm) == base


def test_weights_reloaded_behind_our_back_are_noticed(base_active, zoo, llm):
    client = base_active
    client.activate("a")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(zoo.base)})
    with pytest.raises(SwitchError, match="rebase"):
        client.activate("b")
    llm.collective_rpc("shira_rebase")
    llm.reset_prefix_cache()
    check(llm, zoo, "a")
    client.deactivate()
    check(llm, zoo, "base")


def test_an_embedding_that_is_adapted_with_its_tied_head(forked, tmp_path):
    """As ``ensure_weight_tying`` and ``trainable_token_indices`` train it: the merged model's."""
    base = save_model(tmp_path / "tied", tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    made = make_adapter(weights_of(base), 3)
    rows = torch.arange(5 * SIZES["hidden_size"], 30 * SIZES["hidden_size"])  # of 25 tokens
    values = 0.1 * torch.randn(len(rows), generator=torch.Generator().manual_seed(0))
    delta = SparseDelta(Support((SIZES["vocab_size"], SIZES["hidden_size"]), rows), values)
    deltas = {**made, embedding: delta, head: delta}
    Adapter(deltas, {"tied_weights": {head: embedding}}).save(tmp_path / "adapter")
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    expected, plain = answers(tmp_path / "merged"), answers(base)
    assert [tokens for tokens, _ in expected] != [tokens for tokens, _ in plain]
    llm = LLM(model=str(base), worker_extension_cls=EXTENSION, **ENGINE)
    client = Client(llm)
    client.load("tied", str(tmp_path / "adapter"))
    before = checksums(llm)
    for state, wanted in ((["tied"], expected), ([], plain)):
        client.activate(state[0]) if state else client.deactivate()
        got = generate(llm)
        assert [tokens for tokens, _, _ in got] == [tokens for tokens, _ in wanted]
    assert checksums(llm) == before
    llm.llm_engine.engine_core.shutdown()
