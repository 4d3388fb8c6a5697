# SPDX-License-Identifier: Apache-2.0
"""``AsyncLLM``: switching while requests run and queue; no answer mixes two states or is lost."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from shira.errors import AdapterError, RestoreError, ServeError, UnknownAdapterError
from shira.serve.client import AsyncClient
from tests.serve.engine.zoo import ENGINE, EXTENSION, PROMPTS, TOKENS, make_adapter

pytestmark = pytest.mark.vllm
numbers = itertools.count()


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    rest = asyncio.all_tasks(loop)
    for task in rest:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
    loop.close()


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def engine(request, loop, zoo, forked):
    options = dict(ENGINE)
    patch = pytest.MonkeyPatch()
    if request.param == 2:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        options |= {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}

    async def start():
        arguments = AsyncEngineArgs(model=str(zoo.base), worker_extension_cls=EXTENSION, **options)
        return AsyncLLM.from_engine_args(arguments)

    engine = loop.run_until_complete(start())
    assert engine.vllm_config.parallel_config.world_size == request.param
    yield engine
    engine.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def client(loop, engine, zoo):
    async def start():
        client = await AsyncClient.of(engine)
        for name in zoo.adapters:
            await client.load(name, zoo.path(name))
        return client

    return loop.run_until_complete(start())


async def ask(engine, prompt, tokens=TOKENS, begun=None):
    params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": prompt}, params, f"r{next(numbers)}"):
        last = output
        if begun is not None:
            begun.set()
    return list(last.outputs[0].token_ids)


def expected(zoo, state):
    return [tokens for tokens, _ in zoo.answers[state]]


async def answers(engine):
    return list(await asyncio.gather(*[ask(engine, prompt) for prompt in PROMPTS]))


def test_each_state_after_each_other(loop, engine, client, zoo):
    async def steps():
        assert await answers(engine) == expected(zoo, "base")
        for state in ["a", "b", "a", "both", "base", "half"]:
            await client.activate(zoo.states[state])
            assert client.active == zoo.states[state]
            assert await answers(engine) == expected(zoo, state)
        await client.deactivate()
        assert await answers(engine) == expected(zoo, "base")

    loop.run_until_complete(steps())


def test_a_switch_waits_for_what_runs_and_what_comes_meanwhile_waits_for_it(
    loop, engine, client, zoo
):
    async def steps():
        await client.deactivate()
        alone = await ask(engine, PROMPTS[0], 100)
        begun = asyncio.Event()
        running = asyncio.ensure_future(ask(engine, PROMPTS[0], 100, begun))
        await begun.wait()
        switch = asyncio.ensure_future(client.activate("a"))
        while not (await engine.is_paused() or switch.done()):
            pass  # what comes before the engine pauses would still be the base's
        assert not running.done()
        after = [asyncio.ensure_future(ask(engine, prompt)) for prompt in PROMPTS]
        await switch
        assert running.done(), "switched under a running request"
        assert await running == alone
        assert list(await asyncio.gather(*after)) == expected(zoo, "a")

    loop.run_until_complete(steps())


def test_many_requests_and_many_switches(loop, engine, client, zoo):
    """Requests that hold the client's gate learn under which state they were answered."""
    rng = random.Random(0)
    right = {state: expected(zoo, state) for state in ("base", "a", "b", "both")}

    async def one(which):
        async with client._gate.using(None):
            state = next(s for s in right if zoo.states[s] == client.active)
            return state, which, await ask(engine, PROMPTS[which])

    async def steps():
        asking = []
        for _ in range(12):
            asking += [asyncio.ensure_future(one(rng.randrange(3))) for _ in range(5)]
            await asyncio.sleep(0.02)
            await client.activate(zoo.states[rng.choice(list(right))])
        return await asyncio.gather(*asking)

    seen = loop.run_until_complete(steps())
    assert len(seen) == 60
    for state, which, tokens in seen:
        assert tokens == right[state][which]
    assert len({state for state, _, _ in seen}) > 2


def test_with_a_salt_caches_survive(loop, engine, client, zoo):
    async def steps():
        salted = await AsyncClient.of(engine, cache="salt")
        params = SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, ignore_eos=True)
        for rounds in range(2):
            for state in ("a", "b"):
                await salted.activate(zoo.states[state])
                prompt = {"prompt_token_ids": PROMPTS[0]}
                async for output in salted.generate(prompt, params, f"r{next(numbers)}"):
                    last = output
                assert list(last.outputs[0].token_ids) == expected(zoo, state)[0]
                assert (last.num_cached_tokens > 0) == (rounds > 0)

    loop.run_until_complete(steps())


def test_refusals_leave_the_engine_running(loop, engine, client, zoo, tmp_path):
    async def steps():
        await client.activate("b")
        with pytest.raises(UnknownAdapterError):
            await client.activate("c")
        with pytest.raises(FileNotFoundError):
            await client.load("c", str(tmp_path / "nothing"))
        with pytest.raises(AdapterError, match="is active"):
            await client.unload("b")
        assert not await engine.is_paused()
        assert await answers(engine) == expected(zoo, "b")

    loop.run_until_complete(steps())


def test_what_was_held_is_restored_but_not_what_has_changed_since(
    loop, engine, client, zoo, tmp_path
):
    """Into this engine, emptied in the place of a new one."""

    async def empty():
        await client.deactivate()
        for name in list(client.record.adapters):
            await client.unload(name)
        assert (await client.list())["adapters"] == {}

    async def steps():
        changing = tmp_path / "changing"
        zoo.adapters["a"].save(changing, format="peft")
        await client.load("changing", str(changing))
        await client.activate(zoo.states["both"])
        record = client.record
        await empty()
        await client.restore(record)
        assert client.record == record
        assert await answers(engine) == expected(zoo, "both")
        await empty()
        zoo.adapters["b"].save(changing, format="peft")
        with pytest.raises(RestoreError, match="changing' has changed") as caught:
            await client.restore(record)
        assert set(caught.value.failed) == {"changing"}
        assert set((await client.list())["adapters"]) == {"a", "b"}
        assert await answers(engine) == expected(zoo, "both")

    loop.run_until_complete(steps())


def test_a_bound_on_memory_and_loads_beside_requests(loop, engine, client, zoo, tmp_path):
    """Adapters that were dropped answer as before; one whose file is gone is refused alone."""

    async def steps():
        await client.activate("b")
        nbytes = (await client.list())["adapters"]["a"]["nbytes"]
        await client.limit(2 * nbytes + nbytes // 4)  # parts of ranks differ
        running = asyncio.ensure_future(ask(engine, PROMPTS[0], 100))
        for name in "cd":
            zoo.adapters["a"].save(tmp_path / name, format="peft")
            await client.load(name, str(tmp_path / name))
        assert set((await client.list())["on_disk"]) == {"a", "c"}
        assert (await running)[:TOKENS] == expected(zoo, "b")[0]
        for name, like in (("c", "a"), ("b", "b"), ("a", "a"), ("d", "a"), ("b", "b")):
            await client.activate(name)
            assert name not in (await client.list())["on_disk"]
            assert await answers(engine) == expected(zoo, like)
        (tmp_path / "c" / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError, match=f"adapter 'c' was dropped .* {tmp_path / 'c'}"):
            await client.activate("c")
        assert await answers(engine) == expected(zoo, "b")
        await client.limit(None)
        for name in "cd":
            await client.unload(name)

    loop.run_until_complete(steps())


def test_an_engine_that_was_paused_stays_so(loop, engine, client, zoo):
    async def steps():
        await engine.pause_generation(mode="wait")
        await client.activate("a")
        assert await engine.is_paused()
        await engine.resume_generation()
        assert await answers(engine) == expected(zoo, "a")

    loop.run_until_complete(steps())


def test_sleeping_and_waking(loop, engine, client, zoo):
    async def steps():
        await client.activate(zoo.states["both"])
        await client.sleep(level=2)
        queued = asyncio.ensure_future(ask(engine, PROMPTS[0]))
        with pytest.raises(ServeError, match="discarded"):
            await client.activate("a")
        await client.wake_up()
        assert await queued == expected(zoo, "both")[0]
        assert await answers(engine) == expected(zoo, "both")

    loop.run_until_complete(steps())


def test_requests_that_bring_their_adapter_and_some_that_give_up(loop, engine, client, zoo):
    """Adapters are loaded, unloaded and replaced, and requests cancelled, while others run."""
    states = ["a", "base", "both", "b", "half"]
    params = SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, ignore_eos=True)

    async def one(mixing, i):
        state, which = states[i % 5], i % 3
        prompt = {"prompt_token_ids": PROMPTS[which]}
        brought = zoo.states[state] or None
        async for output in mixing.generate(prompt, params, f"r{next(numbers)}", adapter=brought):
            last = output
        assert list(last.outputs[0].token_ids) == expected(zoo, state)[which]

    async def changing(mixing):
        for state in ("b", "a"):
            await mixing.load("c", zoo.path(state))
            prompt = {"prompt_token_ids": PROMPTS[0]}
            async for output in mixing.generate(prompt, params, f"r{next(numbers)}", adapter="c"):
                last = output
            assert list(last.outputs[0].token_ids) == expected(zoo, state)[0]
            await mixing.unload("c")

    async def steps():
        await client.deactivate()
        mixing = await AsyncClient.of(engine, mixing=True)
        before = (await mixing.mix())["steps"]["riding"]
        asking = [asyncio.ensure_future(one(mixing, i)) for i in range(60)]
        asking.append(asyncio.ensure_future(changing(mixing)))
        await asking[3]
        for i in range(7, 60, 9):
            asking[i].cancel()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        for outcome in outcomes:
            assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
        assert (await mixing.mix())["steps"]["riding"] > before
        assert "c" not in (await mixing.list())["adapters"]
        await one(mixing, 0)  # alone it is resident still, when another is loaded
        await mixing.load("c", zoo.path("b"))
        assert mixing.active == {}
        await one(mixing, 0)
        await mixing.unload("c")
        with pytest.raises(AdapterError, match="finite"):
            await mixing.carry({"a": 1e39})
        await mixing.activate("a")
        with pytest.raises(ServeError, match="deactivate"):
            await anext(mixing.generate("x", params, f"r{next(numbers)}", adapter="b"))
        assert await mixing.carry("b")
        await mixing.deactivate()
        assert await answers(engine) == expected(zoo, "base")

    loop.run_until_complete(steps())


def test_a_bound_on_memory_and_requests_that_bring_their_adapters(
    loop, engine, client, zoo, tmp_path
):
    """Two of four adapters fit; requests for all of them at once, of which some give up."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, ignore_eos=True)
    states = {name: {name: 1.0} for name in "abcd"} | {"both": zoo.states["both"], "base": {}}
    drawn = random.Random(0)

    async def one(mixing, state, which, right):
        prompt, brought = {"prompt_token_ids": PROMPTS[which]}, states[state] or None
        async for output in mixing.generate(prompt, params, f"r{next(numbers)}", adapter=brought):
            last = output
        assert list(last.outputs[0].token_ids) == right[state][which]

    async def looks(mixing, limit):
        while True:
            said = await mixing.list()
            assert sum(said["in_memory"].values()) <= limit
            assert len(said["in_memory"]) + len(said["on_disk"]) == 4
            await asyncio.sleep(0.02)

    async def steps():
        mixing, right = await AsyncClient.of(engine, mixing=True), {}
        for seed, name in ((3, "c"), (4, "d")):
            make_adapter(zoo.weights, seed).save(tmp_path / name, format="peft")
            await mixing.load(name, str(tmp_path / name))
        for state, weights in states.items():
            await mixing.activate(weights)
            right[state] = await answers(engine)
        nbytes = [each["nbytes"] for each in (await mixing.list())["adapters"].values()]
        limit = 2 * max(nbytes) + max(nbytes) // 4  # parts of ranks differ
        await mixing.limit(limit)
        before = (await mixing.mix())["steps"]["riding"]
        looking = asyncio.ensure_future(looks(mixing, limit))
        asking = []
        for i in range(60):
            state = drawn.choice([*states])
            asking.append(asyncio.ensure_future(one(mixing, state, i % 3, right)))
            await asyncio.sleep(drawn.choice([0, 0.01]))
            if i % 9 == 8:
                asking[-2].cancel()
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
        assert not looking.done()
        looking.cancel()
        assert (await mixing.mix())["steps"]["riding"] > before
        with pytest.raises(AdapterError, match="ask for fewer"):
            await anext(mixing.generate("x", params, "r", adapter=dict.fromkeys("abc", 1.0)))
        await mixing.limit(None)
        for name in "cd":
            await mixing.unload(name)
        assert await answers(engine) == expected(zoo, "base")

    loop.run_until_complete(steps())
