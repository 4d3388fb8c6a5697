# SPDX-License-Identifier: Apache-2.0
"""Weights that are cast or moved to another device, also while an adapter is in them.

A cast works on each entry by itself, so the originals and replacement values of an active patch,
cast alike, are what the cast weight needs: taking the adapter out gives the base, cast.
"""

from __future__ import annotations

from collections.abc import Iterable

from shira.errors import SwitchError
from shira.ops.patch import Patch
from shira.switch.apply import Plan
from shira.switch.targets import Layout, Target, layout_of


class Layouts:
    """The weights that patches were made for, and how they were laid out then.

    Attributes:
        targets: By name.
    """

    def __init__(self) -> None:
        self.targets: dict[str, Target] = {}
        self._layouts: dict[Target, Layout] = {}

    def add(self, targets: Iterable[Target]) -> None:
        """Remember weights as they are now."""
        for target in targets:
            self.targets[target.name] = target
            self._layouts[target] = layout_of(target.weight)

    def keep(self, targets: Iterable[Target]) -> None:
        """Forget all others."""
        kept = set(targets)
        self.targets = {name: t for name, t in self.targets.items() if t in kept}
        self._layouts = {t: layout for t, layout in self._layouts.items() if t in kept}

    def moved(self) -> list[Target]:
        """Weights that have another layout than remembered."""
        return [t for t, layout in self._layouts.items() if layout_of(t.weight) != layout]

    def followed(self, moved: Iterable[Target], plan: Plan) -> Plan:
        """Return the plan, moved along with its weights; `add` remembers the new layouts.

        Raises:
            SwitchError: If a weight has lost its values or its shape, or was laid out anew in
                memory with an adapter in it.
        """
        patches = dict(plan)
        for target in moved:
            now = layout_of(target.weight)
            before = self._layouts[target]
            kept = now.dtype.is_floating_point == before.dtype.is_floating_point
            if target.weight.is_meta or not kept:
                raise SwitchError(
                    f"{target.name!r} is {now.dtype} on {now.device} now: no values to switch"
                )
            if now.shape != before.shape:
                raise SwitchError(
                    f"{target.name!r} has shape {now.shape} now, not {before.shape} as when it was "
                    "loaded; make a new Switch"
                )
            if target not in patches:
                continue
            if now.stride != before.stride:
                raise SwitchError(
                    f"{target.name!r} was laid out anew in memory (strides {now.stride}, before "
                    f"{before.stride}) with an adapter in it; deactivate before, or rebase() to "
                    "take it as it is for the base"
                )
            patches[target] = Patch(
                patches[target].offsets.to(now.device),
                patches[target].originals.to(now.device, now.dtype),
                patches[target].replacement.to(now.device, now.dtype),
            )
        return patches
