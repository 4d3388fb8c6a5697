# SPDX-License-Identifier: Apache-2.0
"""The plan for some index tensors on a weight, made once: `plan_for`.

Plans are kept as long as the index tensors live, and are made anew when one of them was written to.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from shira.ops.memory import keep_over_fork
from shira.ops.plan import Plan, make_plan

_KEPT_PER_TENSOR = 8  # combinations of adapters kept for one first adapter
_LATEST = 100_000  # tensors whose latest plan is found without searching


class _Latest:
    """The latest plan for some tensors, and what they were then."""

    __slots__ = ("plan", "seen")

    def __init__(self, tensors: Sequence[Tensor], plan: Plan) -> None:
        self.plan = weakref.ref(plan)
        self.seen = [(weakref.ref(t), t._version, t.data_ptr()) for t in tensors]

    def plan_for(
        self, tensors: Sequence[Tensor], shape: Sequence[int], stride: Sequence[int]
    ) -> Plan | None:
        """The plan, if tensors and weight are what they were."""
        plan = self.plan()
        if plan is None or plan.weight_shape != shape or plan.stride != stride:
            return None
        for (ref, version, pointer), tensor in zip(self.seen, tensors, strict=True):
            if ref() is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
                return None
        return plan


class _Cache:
    """Plans by the index tensors they were made from."""

    def __init__(self) -> None:
        self._by_first: Any = WeakTensorKeyDictionary()
        self._lock = threading.RLock()
        keep_over_fork(self._lock)
        self._latest: dict[tuple[int, ...], _Latest] = {}

    def get(self, indices: Sequence[Tensor], shape: Sequence[int], stride: Sequence[int]) -> Plan:
        """The plan for these index tensors on such a weight, made anew if it has to be."""
        # The same tensors as last time, on the same weight: what a training step asks again and
        # again. Only weak references here; the plan lives as long as the first tensor.
        who = tuple(map(id, indices))
        latest = self._latest.get(who)
        if latest is not None:
            plan = latest.plan_for(indices, shape, stride)
            if plan is not None:
                return plan
        versions = _versions(indices)
        if versions is None:
            return make_plan(indices, shape, stride)
        plan = self._kept(indices, shape, stride, versions)
        if len(self._latest) >= _LATEST:
            self._latest.clear()
        self._latest[who] = _Latest(indices, plan)
        return plan

    def _kept(
        self,
        indices: Sequence[Tensor],
        shape: Sequence[int],
        stride: Sequence[int],
        versions: tuple[int, ...],
    ) -> Plan:
        key = (tuple(map(id, indices)), tuple(shape), tuple(stride))
        first = indices[0]
        with self._lock:
            kept = self._by_first.get(first)
            if kept is None:
                kept = self._by_first[first] = {}
            entry = kept.get(key)
            if entry is not None:
                seen, others, plan = entry
                same = all(ref() is t for ref, t in zip(others, indices[1:], strict=True))
                if seen == versions and same:
                    return plan  # type: ignore[no-any-return]
            plan = make_plan(indices, shape, stride)
            if len(kept) >= _KEPT_PER_TENSOR:
                kept.pop(next(iter(kept)))
            kept[key] = (versions, [weakref.ref(t) for t in indices[1:]], plan)
            return plan


def _versions(indices: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Write counters of the tensors and their memory, or None where torch keeps none."""
    if any(t.is_inference() for t in indices):
        return None
    return tuple(number for t in indices for number in (t._version, t.data_ptr()))


plan_for = _Cache().get
