# SPDX-License-Identifier: Apache-2.0
"""What one can write with adapters: ``0.5 * a + b``, ``a.restrict(...)``, ``a.prune(...)``.

Methods only; `Adapter` inherits them. The work is done in ``shira.fusing`` and ``shira.measure``,
which lie above and load on use.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from shira.errors import ConfigError
from shira.support import Support

if TYPE_CHECKING:
    from shira.delta import Adapter, SparseDelta
    from shira.measure import Comparison


class Operators:
    """Arithmetic and selection on an `Adapter`. Nothing is changed in place."""

    __slots__ = ()

    def __mul__(self, factor: float) -> Adapter:
        """Each value times a finite number; float32, or float64 if the values are.

        An adapter with whole tensors is refused (`AdapterError`): they have no scale.
        """
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            return NotImplemented
        from shira.fusing import fuse

        return fuse([self._adapter], [factor])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Adapter:
        """Each value times ``1 / divisor``."""
        if isinstance(divisor, bool) or not isinstance(divisor, numbers.Real):
            return NotImplemented
        if divisor == 0:
            raise ConfigError("an adapter cannot be divided by 0")
        return self * (1 / divisor)

    def __neg__(self) -> Adapter:
        """Each value with the other sign."""
        return self * -1

    def __add__(self, other: Adapter) -> Adapter:
        """``fuse([self, other])``: on the union of the positions, summed in float32.

        Whole tensors are carried; two different ones of one name are refused.
        """
        if not isinstance(other, type(self)):
            return NotImplemented
        from shira.fusing import fuse

        return fuse([self._adapter, other])

    def __radd__(self, other: object) -> Adapter:
        """So that ``sum(adapters)``, which begins with 0, works."""
        return self._adapter if other == 0 else NotImplemented

    def __sub__(self, other: Adapter) -> Adapter:
        """``fuse([self, other], [1, -1])``; what cancels stays as an entry of value 0."""
        if not isinstance(other, type(self)):
            return NotImplemented
        from shira.fusing import fuse

        return fuse([self._adapter, other], [1.0, -1.0])

    def restrict(
        self,
        which: Iterable[str] | Callable[[str], bool] | Mapping[str, Support | SparseDelta],
    ) -> Adapter:
        """Part of the adapter; values keep their bits.

        Args:
            which: Names of parameters, and of whole tensors; or a function of a name that says
                whether to keep it; or ``{name: Support}``, to keep the positions that both have; or
                another adapter, to keep its positions and the whole tensors of names that it has
                whole too. ``adapter.restrict(list(adapter))`` is the adapter without its whole
                tensors.

        Raises:
            UnknownAdapterError: If a name is not a parameter of the adapter.
            AdapterError: If a support is of another shape.
        """
        from shira.fusing import restrict

        return restrict(self._adapter, which)

    def prune(self, k: int | None = None, *, density: float | None = None) -> Adapter:
        """The entries of largest magnitude, over all parameters together; values keep their bits.

        Of equal magnitudes the first are kept. A parameter may end with no entry. Whole tensors
        stay as they are.

        Args:
            k: How many entries to keep; with as many or more, the adapter is returned as it is.
            density: Instead of k: the most that `density` of the result may be.

        Raises:
            ConfigError: If neither or both are given, or not possible.
        """
        from shira.fusing import fuse

        if k is None and density is None:
            raise ConfigError("say how much is to stay: k entries, or a density")
        if k is None:
            assert density is not None
            if not (isinstance(density, (int, float)) and math.isfinite(density)):
                raise ConfigError(f"density is a share in (0, 1], not {density!r}")
        return fuse([self._adapter], method="magnitude", k=k, density=density)

    def to(
        self, dtype: torch.dtype | None = None, *, device: torch.device | str | None = None
    ) -> Adapter:
        """The adapter with its values in another dtype, rounded to nearest, or on another device.

        Whole tensors keep their dtype.

        Raises:
            AdapterError: If the dtype is not floating point, or a finite value is beyond its range.
        """
        from shira.fusing import cast

        return cast(self._adapter, dtype, device)

    def compare(self, other: Adapter) -> Comparison:
        """Where and by how much two adapters differ; ``==`` merely says whether they do.

        Raises:
            AdapterError: If ``other`` is no adapter.
        """
        from shira.measure import compare

        return compare(self._adapter, other)

    @property
    def _adapter(self) -> Adapter:
        return cast("Adapter", cast(Any, self))
