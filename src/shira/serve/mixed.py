# SPDX-License-Identifier: Apache-2.0
"""`MixedBatches`: requests for different adapters in one batch of a vLLM worker; nobody waits.

A request carries its adapter in the ``extra_args`` of its sampling parameters
(`shira.serve.messages.Carried`); without one the base answers. Before each forward the worker asks
which rows of the batch are whose, and an adapted layer adds to these rows what the adapter
changes, on top of the base's product (`shira.ops.add_products`): the adapter *rides*. What is added
is the merged weight less the base's, as the weights' dtype rounds them, so that the answer is the
merged model's but for the order of summation. A looked-up embedding has the merged table's bits.
Experts, which a kernel computes all at once, hold an adapter for as long as its rows are computed
with them, after those of the base.

One adapter at a time may be *resident* instead, in the weights, at no cost a token. Each worker
chooses alike, from what runs::

    all requests that run are one adapter's:
        none of them has ridden yet    it becomes resident at once; answers have a merged model's
                                       bits
        some have                      after `CALM` such steps in a row
    another adapter, or the base, is wanted too:
                                       the base is put back, and all adapters ride

So the base never rides: its rows have the base's bits whatever is beside them. With a bound on
memory (`shira.serve.holding`) the clients see to it that an adapter is in memory before a request
that rides on it is handed on, and until it has ended. One that is on disk nevertheless, as for a
request that came past the clients, is read again for the step, beyond the bound if there is no
room. What is made of an adapter for riding is let go when the adapter leaves memory.

Knows of vLLM's model runner (made and tested for 0.32) what is called below, and imports nothing of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from shira import ops
from shira.base import accumulation_dtype
from shira.checkpoints.boxes import storage_key
from shira.errors import ServeError, listed
from shira.ops.gaps import pack
from shira.serve.loading import LoadedAdapter
from shira.serve.messages import KEY, scales_of
from shira.serve.placement import Storage
from shira.serve.worker import WorkerAdapters
from shira.support import Support
from shira.switch.weights import Plan

CALM = 8
"""Steps of one adapter alone after which it becomes resident, if its requests have ridden."""

Scales: TypeAlias = tuple[tuple[str, float], ...]
_BASE: Scales = ()

# vLLM's ways of computing with a plain weight, and what they do with it.
_PLAIN = {
    "UnquantizedLinearMethod": ("apply",),
    "UnquantizedEmbeddingMethod": ("apply", "embedding"),
    "UnquantizedFusedMoEMethod": ("apply",),
}
_OF_EXPERTS = ("w13_weight", "w2_weight")
_PROBE = 7, 3  # tokens and rows of logits of the run that finds out who is called


class Entries(NamedTuple):
    """An adapter in one layer's weight."""

    indices: Tensor  # int32 (2, k), or packed
    delta: Tensor  # (k,), wide: the merged weight's entries less the base's
    merged: Tensor  # (k,) in the weight's dtype


class Rider(NamedTuple):
    """An adapter, or several with their scales, as they ride: O(k)."""

    made_of: tuple[LoadedAdapter, ...]
    layers: Mapping[nn.Module, Entries | Plan[Storage]]  # patches, if it has experts


class Groups:
    """The rows of a batch that ride, by rider; ``count`` rows in all."""

    def __init__(self, count: int, riders: list[Rider], rows: list[Tensor]) -> None:
        self.count, self.riders, self.rows = count, riders, rows
        self._of: dict[tuple[int, ...], tuple[Tensor, list[int]]] = {}

    def on(self, layer: nn.Module) -> tuple[list[Any], Tensor, list[int]] | None:
        """Return the entries of those who change a layer, their rows, and how many each has."""
        which = tuple(i for i, rider in enumerate(self.riders) if layer in rider.layers)
        if not which:
            return None
        if which not in self._of:
            rows = [self.rows[i] for i in which]
            self._of[which] = torch.cat(rows), [len(each) for each in rows]
        return [self.riders[i].layers[layer] for i in which], *self._of[which]


class MixedBatches:
    """The mixed batches of one worker: its runner's steps and its model's layers are watched.

    Args:
        runner: vLLM's model runner, version 1, without a compiled graph.
        adapters: Of the same model.
    """

    def __init__(self, runner: Any, adapters: WorkerAdapters) -> None:
        self.runner, self.adapters = runner, adapters
        self.resident: Scales = _BASE
        self._retired: set[str] = set()  # names: requests that still have them were cancelled
        self.steps = {"resident": 0, "riding": 0, "switches": 0}
        self._riders: dict[Scales, Rider] = {}
        self._ridden: set[str] = set()  # requests
        self._calm = 0
        self._now: Groups | None = None  # inside the forward
        self._layers: Groups | None = None
        self._logits: Groups | None = None
        self._called: set[nn.Module] = set()
        self._probing: dict[tuple[nn.Module, str], set[tuple[str, int]]] | None = None
        self._stage = "layers"
        self._users = self._find_users()
        with ExitStack() as unwatch:  # if the run that finds out who is called fails
            self._watch(unwatch)
            self._heads, self._good = self._probe()
            unwatch.pop_all()
        adapters.holding.let_go = self._forget_riders

    def why_not(self, scales: Mapping[str, float]) -> str:
        """Return why adapters cannot ride, or an empty text: a weight that others compute with."""
        found = (self.why_not_this(name, self.adapters.require(name)) for name in scales)
        return next(filter(None, found), "")

    def why_not_this(self, name: str, loaded: LoadedAdapter) -> str:
        """Return what `why_not` does, of an adapter with its entries."""
        for storage in loaded.entries:
            for path, layer, parameter in self._users[storage.key]:
                weights = _OF_EXPERTS if _has_experts(layer) else ("weight",)
                if layer not in self._good or parameter not in weights:
                    return (
                        f"adapter {name!r} changes {path!r}, with which vLLM does not compute "
                        "as a plain linear layer, or plain experts, of one row a token"
                    )
        return ""

    def settle(self) -> None:
        """Put back what is resident; whoever changes or reads adapters does so first."""
        self._layers = self._logits = None
        self._reside(_BASE)

    def retire(self, name: str) -> None:
        """Take requests that still have an unloaded adapter for cancelled ones."""
        self._retired.add(name)

    def begin(self, counts: Sequence[int]) -> None:
        """Learn what the next forward computes: of each request in the batch, how many tokens."""
        ids: list[str] = self.runner.input_batch.req_ids
        mine = [self._wanted_by(self.runner.requests[each]) for each in ids]
        self._layers = self._logits = None
        if self.adapters.active and self.resident == _BASE:  # switched to, from outside
            if any(mine):
                raise ServeError(
                    f"a request for {dict(next(filter(None, mine)))} came while the weights hold "
                    f"{self.adapters.active}: put the base back first"
                )
            return
        self._choose({*mine, *map(self._wanted_by, self.runner.requests.values())})
        if self.resident != _BASE or not any(mine):
            self.steps["resident"] += self.resident != _BASE
            return
        self.steps["riding"] += 1
        self._ridden.update(each for each, scales in zip(ids, mine, strict=True) if scales)
        device = self.runner.device
        tokens = torch.as_tensor(counts, dtype=torch.int64)
        of_token = torch.repeat_interleave(torch.arange(len(ids)), tokens)
        names = [scales for scales in dict.fromkeys(mine) if scales]
        number = {scales: i for i, scales in enumerate(names)}
        of_request = torch.tensor([number.get(scales, -1) for scales in mine])
        riders = [self._rider(scales) for scales in names]

        def groups(whose: Tensor) -> Groups:
            rows = [(whose == i).nonzero().flatten().to(device) for i in range(len(riders))]
            return Groups(len(whose), riders, rows)

        self._layers, self._logits = groups(of_request[of_token]), groups(of_request)

    # --- which adapter is where ------------------------------------------------------------------

    def _wanted_by(self, request: Any) -> Scales:
        parameters = request.sampling_params
        extra = None if parameters is None else parameters.extra_args
        if not extra or KEY not in extra:
            return _BASE
        scales = scales_of(extra[KEY])
        if not self._retired.isdisjoint(name for name in scales if not self.adapters.knows(name)):
            return _BASE
        return tuple(scales.items())

    def _choose(self, running: set[Scales]) -> None:
        self._ridden &= self.runner.requests.keys()
        alone = next(iter(running)) if len(running) == 1 else _BASE
        self._calm = self._calm + 1 if alone != _BASE else 0
        if alone == _BASE or not self._ridden or self._calm >= CALM:
            self._reside(alone)

    def _reside(self, scales: Scales) -> None:
        if scales == self.resident:
            return
        self._in_memory(scales)
        with torch.inference_mode(False), torch.no_grad():
            self.adapters.activate(dict(scales))
        self.resident = scales
        self.steps["switches"] += 1

    def _in_memory(self, scales: Scales) -> tuple[LoadedAdapter, ...]:
        """Return adapters that a step needs; nothing is dropped in a step."""
        # Made in a step, in which torch would take the tensors for passing ones.
        with torch.inference_mode(False), torch.no_grad():
            return tuple(self.adapters.require(name, beyond=True) for name, _ in scales)

    def _rider(self, scales: Scales) -> Rider:
        made_of = self._in_memory(scales)
        kept = self._riders.get(scales)
        if kept is not None and all(a is b for a, b in zip(kept.made_of, made_of, strict=True)):
            return kept
        if why := self.why_not(dict(scales)):
            raise ServeError(f"{why}: it is served by switching only")
        self._forget_riders()
        layers: dict[nn.Module, Any] = {}
        with torch.inference_mode(False), torch.no_grad():
            for storage, patch in self.adapters.patches(dict(scales)).items():
                users = [layer for _, layer, _ in self._users[storage.key]]
                if _has_experts(users[0]):
                    for layer in users:
                        layers.setdefault(layer, {})[storage] = patch
                    continue
                wide = accumulation_dtype(patch.originals.dtype)
                delta = patch.replacement.to(wide) - patch.originals.to(wide)
                shape = _weight(users[0]).shape
                support = Support._trusted(tuple(shape), patch.offsets.long())
                entries = Entries(pack(support.coordinates(), shape), delta, patch.replacement)
                layers.update(dict.fromkeys(users, entries))
        self._riders[scales] = Rider(made_of, layers)
        return self._riders[scales]

    def _forget_riders(self) -> None:
        """Drop those that were made of adapters that are no longer held."""
        held = {id(each) for each in self.adapters.adapters.values()}
        self._riders = {
            key: rider
            for key, rider in self._riders.items()
            if all(id(each) in held for each in rider.made_of)
        }

    # --- how vLLM is watched ---------------------------------------------------------------------

    def _watch(self, unwatch: ExitStack) -> None:
        """Put calls of our own around vLLM's; ``unwatch`` takes them away again."""

        def put(where: Any, name: str, value: Any) -> None:
            own = vars(where)
            unwatch.callback(own.update, {name: own[name]} if name in own else {})
            unwatch.callback(own.pop, name)
            setattr(where, name, value)

        runner = self.runner
        prepare, forward = runner._prepare_inputs, runner._model_forward
        prompt_logprobs = runner._get_prompt_logprobs_dict

        def prepared(scheduler_output: Any, counts: Any) -> Any:
            # The batch has been updated and is in the order in which it will be computed.
            self.begin(counts.tolist())
            return prepare(scheduler_output, counts)

        def forwarded(*args: Any, **kwargs: Any) -> Any:
            if self._layers is None:
                return forward(*args, **kwargs)
            self._now = self._layers
            self._called = set()
            try:
                result = forward(*args, **kwargs)
            finally:
                self._now = None
            for rider in self._layers.riders:
                if missed := rider.layers.keys() - self._called - self._heads:
                    users = (user for found in self._users.values() for user in found)
                    names = [path for path, layer, _ in users if layer in missed]
                    raise ServeError(f"adapted layers were not computed: {listed(names)}")
            return result

        def prompts_scored(hidden: Tensor, counts: Any) -> dict[str, Any]:
            if self._logits is None:
                return prompt_logprobs(hidden, counts)  # type: ignore[no-any-return]
            asked, logits, scored = runner.num_prompt_logprobs, self._logits, {}
            for each in list(asked):  # one after the other, so that all rows are its adapter's
                scales = self._wanted_by(runner.requests[each])
                riders = [self._rider(scales)] if scales else []
                self._logits = Groups(-1, riders, [])
                runner.num_prompt_logprobs = {each: asked[each]}
                scored.update(prompt_logprobs(hidden, counts))
                if not runner.num_prompt_logprobs:
                    del asked[each]
            runner.num_prompt_logprobs, self._logits = asked, logits
            return scored

        put(runner, "_prepare_inputs", prepared)
        put(runner, "_model_forward", forwarded)
        put(runner, "_get_prompt_logprobs_dict", prompts_scored)
        for layer in runner.get_model().modules():
            method: Any = getattr(layer, "quant_method", None)
            for kind in _PLAIN.get(type(method).__name__, ()):
                if kind not in vars(method):  # some layers share one
                    put(method, kind, self._wrapped(kind, getattr(method, kind)))
            if getattr(layer, "use_fused_embedding", False):  # which would not ask its method
                put(layer, "use_fused_embedding", False)

    def _wrapped(self, kind: str, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            groups = self._now
            # experts may overwrite their input
            riding = groups is not None and _has_experts(layer) and groups.on(layer) is not None
            before = x.clone() if riding else x
            result = compute(layer, x, *args, **kwargs)
            if groups is None:
                if self._probing is not None:
                    rows = len(x) if x.dim() == (1 if kind == "embedding" else 2) else -1
                    if not isinstance(result, Tensor) or len(result) != len(x):
                        rows = -1
                    self._probing.setdefault((layer, kind), set()).add((self._stage, rows))
                    return result
                if self._logits is None or kind != "apply" or layer not in self._heads:
                    return result
                groups = self._logits

            def again(at: Tensor) -> Tensor:  # experts, for these rows
                topk = {name: kwargs[name][at] for name in ("topk_weights", "topk_ids")}
                rest = {"shared_experts": None, "shared_experts_input": None}
                return compute(layer, before[at], **topk, **rest)

            return self._on_top(layer, kind, groups, x, result, again)

        return computed

    def _on_top(
        self, layer: nn.Module, kind: str, groups: Groups, x: Tensor, result: Tensor,
        again: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        if groups.count < 0:  # all rows are of one
            everything = [torch.arange(len(x), device=x.device) for _ in groups.riders]
            groups = Groups(len(x), groups.riders, everything)
        found = groups.on(layer)
        if found is None:
            return result
        self._called.add(layer)
        entries, rows, counts = found
        if len(x) < groups.count or (layer in self._heads and len(x) != groups.count):
            raise ServeError(f"a layer computes {len(x)} rows in a step of {groups.count}")
        if _has_experts(layer):
            for plan, at in zip(entries, torch.split(rows, counts), strict=True):
                with self.adapters.inside(plan):
                    result[at] = again(at)
            return result
        rows_of, columns = _weight(layer).shape
        if kind == "embedding":
            for each, at in zip(entries, torch.split(rows, counts), strict=True):
                places, hits = ops.looked_up(x[at], each.indices, (rows_of, columns))
                result[at[places // columns], places % columns] = each.merged[hits]
            return result
        deltas, indices = [each.delta for each in entries], [each.indices for each in entries]
        return ops.add_products(result, x, rows, counts, deltas, indices, (rows_of, columns))

    def _find_users(self) -> dict[int, list[tuple[str, nn.Module, str]]]:
        users: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in self.runner.get_model().named_modules():
            for where in (module._parameters, module._buffers):
                for name, tensor in where.items():
                    if tensor is not None:
                        found = users.setdefault(storage_key(tensor), [])
                        found.append((f"{path}.{name}", module, name))
        return users

    @torch.inference_mode()
    def _probe(self) -> tuple[set[nn.Module], set[nn.Module]]:
        """Return the layers that make logits, and all that can carry riders."""
        tokens, logits = _PROBE
        calls = self._probing = {}
        try:
            hidden, _ = self.runner._dummy_run(tokens)
            self._stage = "logits"
            self.runner.get_model().compute_logits(hidden[:logits].clone())
        finally:
            self._stage, self._probing = "layers", None
        right = {("apply", "layers", tokens), ("embedding", "layers", tokens)}
        right.add(("apply", "logits", logits))
        heads = {layer for (layer, _), seen in calls.items() if ("logits", logits) in seen}
        return heads, _plain(calls, right)


def _plain(
    calls: Mapping[tuple[nn.Module, str], Iterable[tuple[str, int]]],
    right: set[tuple[str, str, int]],
) -> set[nn.Module]:
    """Return the layers that were called as they should, and in no other way."""
    wrong = {
        layer
        for (layer, kind), seen in calls.items()
        if any((kind, stage, rows) not in right for stage, rows in seen)
    }
    plain = {layer for layer, _ in calls if layer not in wrong}
    return {layer for layer in plain if _has_experts(layer) or _whole(_weight(layer))}


def _has_experts(layer: nn.Module) -> bool:
    return type(getattr(layer, "quant_method", None)).__name__ == "UnquantizedFusedMoEMethod"


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _whole(weight: Tensor) -> bool:
    """Return whether a weight is a matrix that has a storage for itself: places are entries."""
    own = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return own and weight.dim() == 2 and weight.is_contiguous()
