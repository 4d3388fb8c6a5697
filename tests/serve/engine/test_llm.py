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
    options["max_num_batched_tokens"] = 256  # so that prompts of mixed batches come in pieces
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
    with pytest.raises(ServeError, match="asleep"):
        client.activate("a")
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


# --- requests that bring their adapters along ----------------------------------------------------


@pytest.fixture
def mixing(base_active, llm):
    llm.reset_prefix_cache()
    return Client(llm, mixing=True)


def mixed(client, zoo, states):
    """One batch of all prompts for each state; checked as in `check`, and what came out."""
    prompts = [{"prompt_token_ids": prompt} for _ in states for prompt in PROMPTS]
    brought = [zoo.states[state] or None for state in states for _ in PROMPTS]
    out = client.generate(prompts, GREEDY, use_tqdm=False, adapters=brought)
    right = [answer for state in states for answer in zoo.answers[state]]
    for request, (tokens, logprobs) in zip(out, right, strict=True):
        assert list(request.outputs[0].token_ids) == tokens
        ours = scores(request)
        assert max(abs(x - y) for x, y in zip(ours, logprobs, strict=True)) < 1e-5
    return out


def scores(request):
    (got,) = request.outputs
    return [row[token].logprob for row, token in zip(got.logprobs, got.token_ids, strict=True)]


def test_a_batch_of_many_adapters(mixing, zoo, llm):
    """More requests than fit a batch, prompts in pieces, blocks kept: each its own answer."""
    base, before = checksums(llm), mixing.mix()["steps"]
    states = ["a", "base", "b", "both", "half"]
    assert sum(each.num_cached_tokens for each in mixed(mixing, zoo, states)) == 0
    again = mixed(mixing, zoo, states[::-1])
    assert all(each.num_cached_tokens > 0 for each in again)
    assert mixing.mix()["steps"]["riding"] > before["riding"] + 2 * TOKENS
    assert checksums(llm) == base
    assert mixing.active == {}


def test_one_adapter_alone_has_the_bits_of_an_active_one(mixing, zoo, llm):
    """Asked one after the other, for the engine makes batches of what has come so far."""

    def one_by_one(adapter):
        each = [
            mixing.generate([prompt], GREEDY, use_tqdm=False, adapters=adapter)
            for prompt in PROMPTS
        ]
        return [scores(request) for (request,) in each]

    before = mixing.mix()["steps"]
    alone = {state: one_by_one(zoo.states[state]) for state in ("b", "both", "base")}
    after = mixing.mix()["steps"]
    assert after["resident"] == before["resident"] + 2 * len(PROMPTS) * TOKENS
    assert after["riding"] == before["riding"]
    mixed(mixing, zoo, ["b", "both", "base"])
    assert one_by_one(None) == alone["base"]
    for state, got in alone.items():
        with mixing.using(zoo.states[state]):
            active = [generate(llm, [prompt])[0][1] for prompt in PROMPTS]
        assert got == active


def test_scores_of_prompts_in_a_mixed_batch(mixing, zoo, llm):
    scoring = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": PROMPTS[0]}] * 3
    got = mixing.generate(prompts, scoring, adapters=["a", None, "b"], use_tqdm=False)
    for state, request in zip(("a", "base", "b"), got, strict=True):
        with mixing.using(zoo.states[state]):
            (alone,) = llm.generate(prompts[:1], scoring, use_tqdm=False)
        pairs = zip(request.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True)
        for ours, theirs in pairs:
            for token, score in theirs.items():
                assert abs(ours[token].logprob - score.logprob) < 1e-4


def test_a_name_that_is_given_to_another_adapter(mixing, zoo):
    """Blocks of the first are not taken for the second's."""
    for state in ("a", "b"):
        mixing.load("name", zoo.path(state))
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        out = mixing.generate(prompts, GREEDY, adapters=["name", None, "name"], use_tqdm=False)
        got = [list(each.outputs[0].token_ids) for each in out]
        assert got == [zoo.answers[each][i][0] for i, each in enumerate((state, "base", state))]
        mixing.unload("name")
    with pytest.raises(UnknownAdapterError, match="'name'"):
        mixing.generate(PROMPTS, GREEDY, adapters=["a", None, "name"])


def test_a_bound_on_memory_and_calls_that_bring_adapters(mixing, zoo, llm):
    nbytes = max(each["nbytes"] for each in mixing.list()["adapters"].values())
    mixing.limit(nbytes + nbytes // 4)
    for states in (["a", "base"], ["b", "base", "b"], ["half", "a"]):
        mixed(mixing, zoo, states)
        assert list(mixing.list()["in_memory"]) == ["b" if "b" in states else "a"]
    with pytest.raises(AdapterError, match=r"'a', 'b' take .* ask for fewer of them together"):
        mixed(mixing, zoo, ["a", "b"])
    assert list(mixing.list()["in_memory"]) == ["a"]
    mixing.limit(None)
    mixed(mixing, zoo, ["a", "b", "both"])


def test_what_cannot_ride_is_told_and_can_be_activated(mixing, zoo, llm, tmp_path):
    name = "model.layers.0.input_layernorm.weight"
    norm = SparseDelta(Support((128,), torch.arange(40)), torch.full((40,), 0.5))
    Adapter({**zoo.adapters["a"], name: norm}).save(tmp_path / "norm", format="peft")
    mixing.load("norm", str(tmp_path / "norm"))
    with pytest.raises(ServeError, match="'norm' changes"):
        mixing.generate([PROMPTS[0]], GREEDY, adapters="norm")
    with mixing.using("norm"), pytest.raises(ServeError, match="deactivate"):
        mixing.generate([PROMPTS[0]], GREEDY, adapters="a")
    mixing.unload("norm")
    mixed(mixing, zoo, ["a", "b"])


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
