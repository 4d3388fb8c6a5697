# SPDX-License-Identifier: Apache-2.0
"""New values for held adapters: what is agreed on, what reaches which rank, and the wire."""

from __future__ import annotations

import functools
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, ServeError, UnknownAdapterError
from shira.ops.patch import Exchange
from shira.serve.messages import Processes
from shira.serve.route import Route
from shira.serve.value_sender import FixedSupport, HTTPClient, ValueSender, Wire
from shira.support import Support
from tests.interrupts import at_every_point

from .test_worker import SHAPES, Cluster, adapter_for, merge


def with_values(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: SparseDelta(delta.support, torch.randn(delta.nnz, generator=generator))
            for name, delta in adapter.items()
        }
    )


def routes(cluster, name, adapter, digest=None):
    digest = FixedSupport.of(adapter).digest if digest is None else digest
    return cluster.call(lambda held: Route(held, name, lambda: adapter, digest))


def update(cluster, routes, values):
    by_held = {id(route.worker): route for route in routes}
    cluster.call(lambda held: by_held[id(held)].update(values))


# --- what is agreed on ---------------------------------------------------------------------------


def test_the_hash_is_of_names_shapes_and_positions_alone():
    def digest(**supports):
        return FixedSupport(
            {n: Support(s, torch.tensor(i)) for n, (s, i) in supports.items()}
        ).digest

    same = digest(a=((2, 3), [0, 4]), b=((5,), [1]))
    assert same == digest(b=((5,), [1]), a=((2, 3), [0, 4]))
    others = [
        digest(a=((3, 2), [0, 4]), b=((5,), [1])),
        digest(a=((2, 3), [0, 5]), b=((5,), [1])),
        digest(a=((2, 3), [0, 4]), c=((5,), [1])),
        digest(a=((2, 3), [0, 4])),
        digest(a=((2, 3), [0]), b=((5,), [1, 4])),
        digest(),
    ]
    assert len({same, *others}) == 7


@settings(deadline=None, max_examples=30)
@given(ks=st.lists(st.integers(0, 9), max_size=5), seed=st.integers(0, 99))
def test_flat_values_are_by_name_and_position(ks, seed):
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(
        {
            f"w{(i * 7) % 5}": SparseDelta(
                Support.from_unsorted((3, 4), torch.randperm(12, generator=generator)[:k]),
                torch.randn(k, generator=generator),
            )
            for i, k in enumerate(ks)
        }
    )
    fixed = FixedSupport.of(adapter)
    values = fixed.flat(adapter)
    assert values.numel() == fixed.nnz == adapter.nnz
    in_order = [adapter[name].values for name in sorted(adapter)]
    assert torch.equal(values, torch.cat([torch.empty(0), *in_order]))
    assert fixed.flat(adapter, torch.bfloat16).dtype == torch.bfloat16


def test_other_positions_are_not_flattened():
    adapter = adapter_for({}, 1)
    fixed = FixedSupport.of(adapter)
    with pytest.raises(AdapterError, match="'q' has other positions"):
        fixed.flat(Adapter({**adapter, "q": adapter_for({}, 2)["q"]}))
    with pytest.raises(AdapterError, match="'embed'"):
        fixed.flat(Adapter({name: adapter[name] for name in adapter if name != "embed"}))


# --- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_exact_and_the_base_comes_back(ranks, dtype):
    cluster = Cluster(ranks, dtype)
    adapters = {name: adapter_for(cluster.base, seed) for seed, name in enumerate("ab")}
    for name, adapter in adapters.items():
        cluster.load(name, adapter)
    fixed = FixedSupport.of(adapters["a"])
    route = routes(cluster, "a", adapters["a"])
    states = []
    for step, active in enumerate([{}, {"a": 1.0}, {"b": 1.0}, {"b": 0.5, "a": -2.0}, {"a": 1.0}]):
        cluster.activate(active)
        for again in range(2):
            adapters["a"] = with_values(adapters["a"], 10 * step + again)
            update(cluster, route, fixed.flat(adapters["a"]))
            cluster.expect(merge(cluster.base, adapters, active))
            states.append({held.state for held in cluster.held})
    assert all(len(each) == 1 for each in states)
    with_a = [next(iter(states[i])) for i in (2, 3, 6, 7, 8, 9)]
    assert len(set(with_a)) == 6, "a state with other values has another salt"
    cluster.activate({})
    cluster.expect(cluster.base)


def test_the_same_values_are_the_same_state_on_all_ranks():
    cluster = Cluster(2)
    adapter = adapter_for(cluster.base, 0)
    cluster.load("a", adapter)
    route = routes(cluster, "a", adapter)
    cluster.activate({"a": 1.0})
    values = FixedSupport.of(adapter).flat(adapter)
    update(cluster, route, values)
    first = {held.state for held in cluster.held}
    update(cluster, route, values * 2)
    update(cluster, route, values)
    assert {held.state for held in cluster.held} == first
    assert len(first) == 1


def test_an_adapter_on_one_rank_alone():
    cluster = Cluster(2)
    adapter = adapter_for(cluster.base, 3, names=["expert1"])
    cluster.load("a", adapter)
    route = routes(cluster, "a", adapter)
    cluster.activate({"a": 1.0})
    new = with_values(adapter, 4)
    update(cluster, route, FixedSupport.of(adapter).flat(new))
    weights = dict(cluster.base)
    weights["expert1"] = merge({"expert1": cluster.base["expert1"]}, {"a": new}, {"a": 1.0})[
        "expert1"
    ]
    cluster.expect(weights)


def test_what_cannot_be_agreed_on():
    cluster = Cluster(2)
    a, b = adapter_for(cluster.base, 0), adapter_for(cluster.base, 1)
    part = Adapter({name: a[name] for name in list(SHAPES)[:2]})
    cluster.load("a", a)
    with pytest.raises(UnknownAdapterError, match="Did you mean 'a'"):
        routes(cluster, "aa", a)
    with pytest.raises(AdapterError, match="the hash"):
        routes(cluster, "a", a, digest=FixedSupport.of(b).digest)
    with pytest.raises(AdapterError, match="other positions"):
        routes(cluster, "a", b)
    with pytest.raises(AdapterError, match="other positions"):
        routes(cluster, "a", part)
    for name in SHAPES:  # what the path has beside what is loaded would go nowhere
        cluster.load(name, Adapter({name: a[name]}))
        with pytest.raises(AdapterError, match="other positions"):
            routes(cluster, name, a)
    empty = SparseDelta(Support(SHAPES["q"], torch.empty(0, dtype=torch.int64)), torch.empty(0))
    cluster.load("empty", Adapter({"q": empty}))
    with pytest.raises(AdapterError, match="other positions"):
        routes(cluster, "empty", a)
    skipped = Adapter({**a, "expert9": a["expert1"]})  # the loader puts it nowhere
    with pytest.raises(AdapterError, match="other positions"):
        routes(cluster, "a", skipped)


def test_what_cannot_be_values_changes_nothing():
    cluster = Cluster(2)
    adapter = adapter_for(cluster.base, 0)
    cluster.load("a", adapter)
    route = routes(cluster, "a", adapter)
    cluster.activate({"a": 1.0})
    values = FixedSupport.of(adapter).flat(adapter)
    broken = values.clone()
    broken[7] = float("inf")
    for wrong in (values[:-1], broken, values.to(torch.int64), values.view(1, -1)):
        with pytest.raises(AdapterError, match="values"):
            update(cluster, route, wrong)
    cluster.expect(merge(cluster.base, {"a": adapter}, {"a": 1.0}))
    cluster.call(lambda held: held.activate({}))
    cluster.call(lambda held: held.unload("a"))
    with pytest.raises(UnknownAdapterError):
        update(cluster, route, values)
    cluster.load("a", adapter_for(cluster.base, 1))  # as many positions, but others
    with pytest.raises(AdapterError, match="anew"):
        update(cluster, route, values)


def test_a_rank_that_fails_in_writing_leaves_the_values_of_before(monkeypatch):
    cluster = Cluster(2)
    adapter = adapter_for(cluster.base, 0)
    cluster.load("a", adapter)
    route = routes(cluster, "a", adapter)
    cluster.activate({"a": 1.0})
    broken = cluster.held[1].model.qk.untyped_storage()._cdata
    run = Exchange.run

    def fail(exchange):
        if exchange.weight.untyped_storage()._cdata == broken:
            raise RuntimeError("no")
        run(exchange)

    monkeypatch.setattr(Exchange, "run", fail)
    new = FixedSupport.of(adapter).flat(with_values(adapter, 5))
    with pytest.raises(ServeError):
        update(cluster, route, new)
    monkeypatch.undo()
    cluster.expect(merge(cluster.base, {"a": adapter}, {"a": 1.0}))
    cluster.activate({})
    cluster.activate({"a": 1.0})
    cluster.expect(merge(cluster.base, {"a": adapter}, {"a": 1.0}))


def test_an_interrupted_update_leaves_the_values_that_the_state_tells():
    cluster, new = Cluster(1), {}
    (held,) = cluster.held
    held.processes = Processes()
    adapter = adapter_for(cluster.base, 0)
    held.load("a", lambda: adapter)
    held.activate({"a": 1.0})
    (route,) = routes(cluster, "a", adapter)
    for seed in (5, 6):
        other = with_values(adapter, seed)
        values = FixedSupport.of(adapter).flat(other)
        route.update(values)
        new[held.state] = values, merge(cluster.base, {"a": other}, {"a": 1.0})
    (first, _), (second, _) = new.values()

    def check():
        cluster.expect(new[held.state][1])
        route.update(first)

    check()
    assert at_every_point(functools.partial(route.update, second), check, every=3) > 100
    held.activate({})
    cluster.expect(cluster.base)


# --- the wire, and the sender over it ------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Workers:
    """A client in front of a cluster: what vLLM and its workers do, in threads."""

    def __init__(self, cluster, adapter):
        self.cluster, self.adapter = cluster, adapter
        self.pool = ThreadPoolExecutor(len(cluster.held))
        self.calls = []
        self.wires, self.routes = {}, {}

    def _all(self, step):
        for future in [self.pool.submit(step, held) for held in self.cluster.held]:
            future.result(timeout=30)

    def _answer(self, held, step):
        failure = None
        try:
            step()
        except Exception as error:
            failure = error
        self.wires[id(held)].answer(failure)

    def init_weight_transfer_engine(self, info):
        def meet(held):
            wire = Wire(info["address"], info["port"], held.processes.rank + 1, info["size"], 20)
            self.wires[id(held)] = wire
            self._answer(held, lambda: self._agree(held, info))

        self.calls.append("init")
        self._all(meet)

    def _agree(self, held, info):
        read = lambda: self.adapter  # noqa: E731
        self.routes[id(held)] = Route(held, info["adapter"], read, info["support"])

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, info):
        def receive(held):
            values = self.wires[id(held)].receive(info["nnz"], getattr(torch, info["dtype"]))
            self._answer(held, lambda: self.routes[id(held)].update(values))

        self.calls.append("update")
        self._all(receive)

    def finish_weight_update(self, weight_version=None):
        self.calls.append("finish")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sender_and_its_workers(ranks):
    cluster = Cluster(ranks)
    adapter = adapter_for(cluster.base, 0)
    cluster.load("policy", adapter)
    cluster.activate({"policy": 1.0})
    client = Workers(cluster, adapter)
    options = {"name": "policy", "path": "-", "workers": ranks, "timeout": 20}
    sender = ValueSender(client, adapter, port=free_port(), **options)
    for step in range(3):
        new = with_values(adapter, step)
        assert sender.send(new) == 4 * adapter.nnz
        cluster.expect(merge(cluster.base, {"policy": new}, {"policy": 1.0}))
    rounded = Adapter(
        {n: SparseDelta(d.support, d.values.to(torch.bfloat16)) for n, d in new.items()}
    )
    assert sender.send(new, torch.bfloat16) == 2 * adapter.nnz
    cluster.expect(merge(cluster.base, {"policy": rounded}, {"policy": 1.0}))

    broken = with_values(adapter, 9)
    broken["down"].values[0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        sender.send(broken)
    broken["down"].values[0] = 1e6
    with pytest.raises(AdapterError, match=r"1 of the .* not finite in float16"):
        sender.send(broken, torch.float16)
    with pytest.raises(AdapterError, match="positions"):
        sender.send(adapter_for(cluster.base, 1))
    cluster.expect(merge(cluster.base, {"policy": rounded}, {"policy": 1.0}))
    sender.send(adapter)  # the next one goes well
    cluster.expect(merge(cluster.base, {"policy": adapter}, {"policy": 1.0}))
    assert (
        client.calls == ["init"] + ["start", "update", "finish"] * 5
    )  # what is refused is not sent


@pytest.mark.parametrize(
    "change", [{"port": 0}, {"workers": 0}, {"timeout": float("nan")}, {"timeout": -1.0}]
)
def test_an_invalid_sender_asks_nobody(change):
    options = {"name": "policy", "path": "-", "workers": 1, "port": 29510, "timeout": 1.0}
    with pytest.raises(ConfigError, match="port and workers"):
        ValueSender(None, adapter_for(Cluster(1).base, 0), **{**options, **change})


def test_a_sender_of_other_positions_is_refused():
    cluster = Cluster(2)
    adapter = adapter_for(cluster.base, 0)
    cluster.load("policy", adapter)
    client = Workers(cluster, adapter)
    other = adapter_for(cluster.base, 1)
    options = {"path": "-", "workers": 2, "timeout": 20}
    with pytest.raises(AdapterError, match="hash"):
        ValueSender(client, other, name="policy", port=free_port(), **options)
    with pytest.raises(UnknownAdapterError, match="polcy"):
        ValueSender(client, adapter, name="polcy", port=free_port(), **options)


def test_a_partner_that_does_not_come():
    with pytest.raises(ServeError, match="wire"):
        Wire("127.0.0.1", free_port(), 0, 2, timeout=0.5)


@pytest.mark.parametrize("when", ["before the workers receive", "after"])
def test_an_engine_that_fails_within_an_update_is_an_error_and_the_update_is_ended(when):
    cluster = Cluster(1)
    adapter = adapter_for(cluster.base, 0)
    cluster.load("policy", adapter)

    class Failing(Workers):
        def update_weights(self, info):
            if when == "after":
                super().update_weights(info)
            raise ServeError("the engine does not answer")

    client = Failing(cluster, adapter)
    options = {"name": "policy", "path": "-", "workers": 1, "timeout": 2}
    sender = ValueSender(client, adapter, port=free_port(), **options)
    for _ in range(2):
        with pytest.raises(ServeError, match="does not answer"):
            sender.send(adapter)
        assert client.calls[-1] == "finish"  # or a server would hold up requests for ever


def test_a_wire_that_breaks_within_an_update_ends_the_update(monkeypatch):
    cluster = Cluster(1)
    adapter = adapter_for(cluster.base, 0)
    cluster.load("policy", adapter)
    client = Workers(cluster, adapter)
    options = {"name": "policy", "path": "-", "workers": 1, "timeout": 2}
    sender = ValueSender(client, adapter, port=free_port(), **options)

    def broken(values):
        raise ServeError("the wire broke")

    monkeypatch.setattr(sender._wire, "send", broken)
    monkeypatch.setattr(client, "update_weights", lambda info: None)
    with pytest.raises(ServeError, match="the wire broke"):
        sender.send(adapter)
    assert client.calls == ["init", "start", "finish"]


def test_answers_of_any_length():
    port, found = free_port(), []

    def worker():
        wire = Wire("127.0.0.1", port, 1, 2, 20)
        for error in (None, ValueError("é" * 3000), ValueError()):
            wire.answer(error)

    thread = threading.Thread(target=worker)
    thread.start()
    wire = Wire("127.0.0.1", port, 0, 2, 20)
    found = [wire.answers()[0] for _ in range(3)]
    thread.join(20)
    assert found[0] is None
    assert found[1].startswith("ValueError: éé")
    assert found[2] == "ValueError: "


class TestHTTPClient:
    """The client against a server that answers as vLLM's routes do, and notes what it was asked."""

    @pytest.fixture
    def server(self):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                told = json.loads(self.rfile.read(size) or b"null")
                asked.append((self.path.strip("/"), told))
                status, said = answers.get(self.path.strip("/"), (200, {"message": "done"}))
                body = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        asked: list[tuple[str, object]] = []
        answers = {"reset_prefix_cache": (200, {"success": True})}
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
            thread = threading.Thread(target=made.serve_forever)
            thread.start()
            yield HTTPClient(f"http://127.0.0.1:{made.server_port}/"), asked, answers
            made.shutdown()
            thread.join()

    def test_an_update_stops_requests_first_and_drops_the_cache_before_they_run_again(
        self, server
    ) -> None:
        client, asked, _ = server
        client.init_weight_transfer_engine({"port": 1})
        client.start_weight_update()
        client.update_weights({"nnz": 3})
        client.finish_weight_update("7")
        assert asked == [
            ("init_weight_transfer_engine", {"init_info": {"port": 1}}),
            ("pause?mode=wait", None),
            ("start_weight_update", None),
            ("update_weights", {"update_info": {"nnz": 3}}),
            ("finish_weight_update", {"weight_version": "7"}),
            ("reset_prefix_cache", None),
            ("resume", None),
        ]

    def test_an_update_that_cannot_begin_lets_requests_run(self, server) -> None:
        client, asked, answers = server
        answers["start_weight_update"] = (500, {"error": "an update is under way"})
        with pytest.raises(ServeError, match=r"answers 500: .*under way"):
            client.start_weight_update()
        assert asked[-1] == ("resume", None)

    def test_with_a_cache_that_stays_no_request_runs(self, server) -> None:
        client, asked, answers = server
        answers["reset_prefix_cache"] = (200, {"success": False})
        with pytest.raises(ServeError, match="stale"):
            client.finish_weight_update()
        assert asked[-1] == ("reset_prefix_cache", None)

    def test_it_says_what_the_server_lacks(self, server) -> None:
        client, _, answers = server
        answers["pause?mode=wait"] = (404, {"detail": "Not Found"})
        with pytest.raises(ServeError, match="VLLM_SERVER_DEV_MODE=1"):
            client.start_weight_update()
        with pytest.raises(ServeError, match="does not answer"):
            HTTPClient("http://127.0.0.1:9", timeout=1).start_weight_update()

    @pytest.mark.parametrize(
        "said", [b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
    )
    def test_a_server_that_ends_within_an_answer_is_an_error(self, said) -> None:
        asked, ended = [], threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                while not ended.is_set():
                    connection, _ = server.accept()
                    with connection:
                        asked.extend(connection.recv(9999).split(b" ")[1:2])
                        connection.sendall(said)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            client = HTTPClient(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=5)
            with pytest.raises(ServeError, match=r"pause\?mode=wait does not answer"):
                client.start_weight_update()
            assert asked == [b"/pause?mode=wait", b"/resume"]
            with pytest.raises(ServeError, match="does not answer"):
                client.finish_weight_update()
            ended.set()
            socket.create_connection(server.getsockname()).close()
            thread.join(5)

    def test_an_answer_that_is_no_object_is_an_error(self, server) -> None:
        client, _, answers = server
        answers["update_weights"] = (200, [3])
        with pytest.raises(ServeError, match="no JSON object"):
            client.update_weights({"nnz": 3})
