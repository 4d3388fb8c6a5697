# SPDX-License-Identifier: Apache-2.0
"""`Switch`: adapters put into any module's weights, exchanged and taken out: exact, in O(k).

``targets`` finds an adapter's parameters in a module; ``weights``, which `shira.serve` uses too,
makes what is written there and exchanges it. `shira.ops.patch` writes.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from shira.adapter import Adapter
from shira.delta import checked_scale
from shira.errors import AdapterError, SwitchError, TargetError, UnknownAdapterError, did_you_mean
from shira.switch.targets import Prepared, Target, give_private_memory, refuse_merged, resolve
from shira.switch.weights import ChangedWeightError, PatchedWeights, Plan, Scales, State, combined

__all__ = ["Switch"]

Which = str | Mapping[str, float]
"""An adapter's name, or names with a scale each; ``{}`` is the base."""


class Switch:
    """Adapters on any module: exact, in place, at the cost of their entries.

    Loading finds the weights, checks that the adapter fits, and prepares what is to be written.
    Switching then only moves bits: originals are put back, replacement values
    ``round(base + sum of scale * delta)`` are written, each entry of the outgoing and incoming
    adapters is visited once, and no other. Weights stay where they are in memory.

    An adapter's whole tensors (`Adapter.tensors`) take the place of the weights and buffers of
    their names, rounded once to their dtype, and the originals come back likewise. Such an adapter
    is active at scale 1, beside others that leave these weights alone or have the same tensors.

    Threads take turns: every method holds `lock`, and `using` holds it for its whole body. A model
    that is used in several threads while others switch is used inside ``with switch.using(...)`` or
    ``with switch.lock``. A process that is forked meanwhile has the adapter that was active, and a
    switch that was not finished is undone by its next call.

    Args:
        module: With the weights; a PEFT model counts as the base inside.
        kept_combinations: How many combinations and scalings are kept ready, the latest used
            first; each takes at most 8 bytes an entry (bf16 weights; fp32: 12).

    Raises:
        TargetError: If ``module`` is no module.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> delta = SparseDelta(Support((2, 3), torch.tensor([0, 4])), torch.tensor([0.5, -1.0]))
        >>> switch = Switch(layer)
        >>> switch.load("a", Adapter({"weight": delta}))
        >>> with switch.using({"a": 2.0}):
        ...     switch.active
        {'a': 2.0}
    """

    def __init__(self, module: nn.Module, *, kept_combinations: int = 8) -> None:
        if not isinstance(module, nn.Module):
            raise TargetError(f"Switch takes an nn.Module, not {type(module).__name__}")
        self.module = module
        self.lock = threading.RLock()
        self._kept_combinations = max(kept_combinations, 0)
        self._loaded: dict[str, Prepared] = {}
        self._weights: PatchedWeights[Target] = PatchedWeights()
        self._combinations: dict[Scales, Plan[Target]] = {}  # the latest used last
        self._adapter_layers: list[nn.Module] = []
        self._to_return_to: list[Scales] = []  # by the bodies of `using` that are under way
        _switches.add(self)

    @property
    def active(self) -> dict[str, float]:
        """``{name: scale}`` of what is in the weights now; empty for the base."""
        return dict(self._weights.state.active)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters that can be activated, in the order of loading."""
        return tuple(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __repr__(self) -> str:
        return f"Switch(loaded={list(self.loaded)}, active={self.active})"

    def load(
        self,
        name: str,
        adapter: Adapter | str | os.PathLike[str],
        *,
        check_base: bool = True,
        allow_tied: bool = False,
    ) -> None:
        """Make an adapter ready; the weights stay as they are, also if another one is active.

        A weight that is mapped from a file or shared with other processes gets memory of its own
        here, with a warning: the only time that one moves.

        Args:
            name: What to call it.
            adapter: The adapter, or the path of one. It is kept; do not change its values.
            check_base: Compare the fingerprint of the base that the adapter records, if it does.
            allow_tied: Accept deltas for a weight that is known under further names; all of them
                see the change.

        Raises:
            AdapterError: If the name is taken, a parameter is absent from the model, or values are
                not finite.
            WrongBaseError: If the base has other values or shapes.
            TargetError: If a weight cannot be written to, or is tied.
            MergeError: If the module has merged adapters of PEFT's.
            FileNotFoundError, FileFormatError: If there is no good file at the path.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is a string that is not empty, not {name!r}")
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter, base=self.module)
        with self.lock:
            if name in self._loaded:
                raise AdapterError(f"an adapter {name!r} is loaded already; unload it first")
            layers = [m for m in self.module.modules() if "merged_adapters" in vars(m)]
            refuse_merged(layers)
            self._weights.settle()
            self._weights.follow(self._forget)
            known = self._targets()
            names = resolve(name, adapter, self.module, known, allow_tied)
            prepared = Prepared(name, adapter, names, check_base)
            prepared.complete(self._weights.state.plan)
            give_private_memory(names, self.module)
            self._weights.remember([*known.values(), *names])
            self._adapter_layers = layers
            self._loaded[name] = prepared

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownAdapterError: If it is not loaded.
            AdapterError: If it is active, or a body of `using` will return to it.
        """
        with self.lock:
            self._require(name)
            for scales in (self._weights.state.active, *self._to_return_to):
                if name in dict(scales):
                    raise AdapterError(f"adapter {name!r} is in use; deactivate it first")
            for scales in [s for s in self._combinations if name in dict(s)]:
                del self._combinations[scales]
            del self._loaded[name]  # last: another of this name must not meet its combinations
            self._weights.remember(self._targets().values())

    def activate(self, which: Which) -> None:
        """Put an adapter, or several, in the place of what is active.

        Several are summed before the one rounding, in the order of their names, so the bits do
        not depend on the order in which they are given. After an error the weights are as before.

        Args:
            which: A name, or ``{name: scale}``; ``{}`` means the base.

        Raises:
            UnknownAdapterError: If a name is not loaded.
            AdapterError: If a scale is not a finite number, or makes values that are not finite; or
                whole tensors are scaled, or two adapters have different ones for one weight.
            MergeError: If the module has merged adapters of PEFT's.
            SwitchError: If somebody else has changed the weights.
        """
        with self.lock:
            self._weights.settle()
            scales = self._scales(which)
            if scales == self._weights.state.active:
                return
            refuse_merged(self._adapter_layers)
            self._weights.follow(self._forget)
            self._go(State(scales, self._plan(scales)))

    def deactivate(self, *, force: bool = False) -> None:
        """Put the originals back, bit for bit.

        Args:
            force: Also where somebody else has changed the entries since; their values are lost.

        Raises:
            SwitchError: If somebody else has changed the weights; nothing is put back then.
        """
        with self.lock:
            self._weights.settle()
            if self._weights.state.active:
                self._weights.follow(self._forget)
                self._go(State(), check=not force)

    @contextmanager
    def using(self, which: Which) -> Iterator[Switch]:
        """`activate` for the body, and back to what was active before; other threads wait.

        Args:
            which: As for `activate`.
        """
        with self.lock:
            before, outer = self._weights.state.active, self._to_return_to
            try:
                self._to_return_to = [*outer, before]
                self.activate(which)
                yield self
            finally:
                self._to_return_to = outer
                try:
                    self.activate(dict(before))
                except BaseException:  # an interrupt, perhaps: once more
                    self.activate(dict(before))
                    raise

    def rebase(self) -> None:
        """Take what the weights hold now for the base; nothing is written.

        For after the base was changed on purpose: fine-tuned, or loaded anew. What was active is
        part of the base from now on where it was not overwritten. Adapters stay loaded; their base
        is checked again when they are activated, unless they were loaded with
        ``check_base=False``.

        Raises:
            SwitchError: Inside the body of `using`.
        """
        with self.lock:
            self._weights.settle()
            if self._to_return_to:
                raise SwitchError(
                    "the body of using() is under way, and returns to the base before"
                )
            self._weights.forget()
            self._combinations.clear()
            for prepared in self._loaded.values():
                prepared.entries.clear()

    def _targets(self) -> dict[str, Target]:
        """Return the weights of all adapters that are loaded, by name."""
        return {target.name: target for one in self._loaded.values() for target in one.names}

    def _require(self, name: object) -> None:
        if name not in self._loaded:
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise UnknownAdapterError(
                f"no adapter {name!r} is loaded; there is {known}."
                f"{did_you_mean(str(name), self._loaded)}"
            )

    def _scales(self, which: Which) -> Scales:
        if isinstance(which, str):
            which = {which: 1.0}
        if not isinstance(which, Mapping):
            raise AdapterError(f"name an adapter, or {{name: scale}}, not {which!r}")
        for name in which:
            self._require(name)
        return tuple(sorted((name, checked_scale(name, scale)) for name, scale in which.items()))

    def _plan(self, scales: Scales) -> Plan[Target]:
        """Return what the weights hold with these adapters in them."""
        members = [(name, scale, self._loaded[name]) for name, scale in scales]
        for name, scale, prepared in members:
            prepared.complete(self._weights.state.plan)
            prepared.adapter.require_scale_one(f"adapter {name!r}", scale)
        if len(members) == 1 and members[0][1] == 1.0:
            return {target: entry.patch for target, entry in members[0][2].entries.items()}
        plan = self._combinations.pop(scales, None)
        if plan is None:
            plan = combined([(name, scale, prepared.entries) for name, scale, prepared in members])
        if scales:
            self._combinations[scales] = plan
            while len(self._combinations) > self._kept_combinations:
                del self._combinations[next(iter(self._combinations))]
        return plan

    def _go(self, after: State[Target], *, check: bool = True) -> None:
        give_private_memory({**self._weights.state.plan, **after.plan}, self.module)
        try:
            self._weights.exchange(after, check=check)
        except ChangedWeightError as error:
            before = error.exchange.before
            expected, remedy = "the base did when the adapter was loaded", ""
            if before is not None and (before.offsets == error.offset).any():
                expected = f"{self.active} put there"
                remedy = "deactivate(force=True) puts the originals back all the same; "
            raise SwitchError(
                f"{error.entry} does not hold what {expected}: somebody else has written to the "
                f"weight since. Nothing was changed. {remedy}rebase() takes the weights as they "
                "are for the base"
            ) from None

    def _forget(self, target: Target) -> None:
        self._combinations.clear()
        for prepared in self._loaded.values():
            prepared.entries.pop(target, None)


def _free_locks() -> None:
    """Free a forked child of what threads hold that it does not have: locks and `using` bodies."""
    for switch in tuple(_switches):
        if not switch.lock._is_owned():  # type: ignore[attr-defined]
            switch.lock = threading.RLock()
            switch._to_return_to = []


_switches: weakref.WeakSet[Switch] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)
