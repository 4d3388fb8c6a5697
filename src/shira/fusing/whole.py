# SPDX-License-Identifier: Apache-2.0
"""The whole tensors of a fused adapter: carried from one, never summed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shira.adapter import Adapter
from shira.delta import same_tensor
from shira.errors import AdapterError, ConfigError, did_you_mean, listed


def whole_tensors(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    whole: str | None = None,
) -> dict[str, Tensor]:
    """Return the whole tensors that adapters have together.

    Args:
        adapters: At least one.
        names: What each is called.
        weights: A factor for each.
        whole: The name of the adapter whose tensors to take; None if all have to agree.

    Raises:
        ConfigError: If ``whole`` is the name of none of them, or of several.
        AdapterError: If two differ in a tensor, a tensor is of an adapter at another weight than 1,
            or what one has whole has a delta in another.
    """
    chosen = list(range(len(adapters)))
    if whole is not None:
        chosen = [at for at, name in enumerate(names) if name == whole]
        if len(chosen) != 1:
            raise ConfigError(
                f"whole={whole!r} is the name of {len(chosen)} of the adapters, which are called "
                f"{listed(names)}.{did_you_mean(whole, names)}"
            )
    found: dict[str, int] = {}
    for at in chosen:
        adapter = adapters[at]
        if adapter.tensors and whole is None and weights[at] != 1.0:
            raise AdapterError(
                f"{names[at]} at weight {weights[at]:g} has whole tensors "
                f"({listed(adapter.tensors)}), which have no scale; whole={names[at]!r} carries "
                "them as they are, and adapter.restrict(list(adapter)) leaves them out"
            )
        for name, tensor in adapter.tensors.items():
            other = found.setdefault(name, at)
            if not same_tensor(adapters[other].tensors[name], tensor):
                raise AdapterError(
                    f"{names[other]} and {names[at]} hold different tensors for the whole of "
                    f"{name!r}, which are not summed; say whose the result has: "
                    f"whole={names[other]!r}"
                )
    for name, at in found.items():
        for called, adapter in zip(names, adapters, strict=True):
            if name in adapter:
                raise AdapterError(
                    f"{name!r} is a whole tensor in {names[at]} and has a delta in {called}: they "
                    "do not go together; leave it out of one with adapter.restrict(...)"
                )
    return {name: adapters[at].tensors[name] for name, at in found.items()}
