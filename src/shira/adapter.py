# SPDX-License-Identifier: Apache-2.0
"""`Adapter`: an adapter as a plain value.

An `Adapter` maps the base model's own parameter names to a `SparseDelta` each, and carries metadata
and the tensors that were trained whole beside them (a new head). Every part of the library takes
and returns it, so it lies below them all; reading, writing, arithmetic and comparison belong to
``store``, ``fusing`` and ``measure`` above, which its methods import when they are called.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from shira.delta import SparseDelta, same_tensor
from shira.errors import AdapterError, ConfigError, UnknownAdapterError, did_you_mean, listed
from shira.support import Support

if TYPE_CHECKING:
    from shira.checkpoints import Base
    from shira.measure import Comparison


class Adapter(Mapping[str, SparseDelta]):
    """`{parameter name: SparseDelta}` with metadata.

    As a mapping it has the deltas alone; `tensors` are beside them. ``0.5 * a + b`` and the other
    operators make a new adapter; nothing is changed in place.

    Args:
        deltas: By the base model's own parameter name, e.g. ``model.layers.0.mlp.up_proj.weight``.
        metadata: Anything that JSON can hold: mask, seed, base model, fingerprint.
        tensors: Whole tensors that take the place of the base's, by the base model's own name of
            the parameter or buffer: what was trained under ``modules_to_save``.

    Raises:
        AdapterError: If a name or value is of another type, or a name has both a delta and a
            tensor.

    Example:
        >>> delta = SparseDelta(Support((2, 3), torch.tensor([0, 4])), torch.tensor([0.5, -1.0]))
        >>> adapter = Adapter({"layer.weight": delta})
        >>> (2 * adapter + adapter)["layer.weight"].values.tolist()
        [1.5, -3.0]
        >>> adapter.save("mine.safetensors")
        >>> Adapter.load("mine.safetensors") == adapter
        True
    """

    __slots__ = ("_deltas", "metadata", "tensors")

    tensors: dict[str, Tensor]

    def __init__(
        self,
        deltas: Mapping[str, SparseDelta],
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        for name, delta in deltas.items():
            if not isinstance(name, str) or not isinstance(delta, SparseDelta):
                raise AdapterError(
                    f"an adapter maps parameter names to SparseDelta, not {name!r} to "
                    f"{type(delta).__name__}"
                )
        for name, tensor in (tensors or {}).items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise AdapterError(
                    f"whole tensors are given by parameter name, not {name!r} as "
                    f"{type(tensor).__name__}"
                )
            if name in deltas:
                raise AdapterError(
                    f"{name!r} has a delta and a whole tensor; a parameter is changed in one way"
                )
        self._deltas = dict(deltas)
        self.metadata = dict(metadata or {})
        self.tensors = {name: tensor.detach() for name, tensor in (tensors or {}).items()}

    def __getitem__(self, name: str) -> SparseDelta:
        try:
            return self._deltas[name]
        except KeyError:
            raise UnknownAdapterError(
                f"the adapter has no parameter {name!r}.{did_you_mean(name, self._deltas)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._deltas

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def nnz(self) -> int:
        """The number of entries in all."""
        return sum(delta.nnz for delta in self._deltas.values())

    @property
    def density(self) -> float:
        """The number of entries over that of the weights they stand in."""
        numel = sum(delta.support.numel for delta in self._deltas.values())
        return self.nnz / numel if numel else 0.0

    def __eq__(self, other: object) -> bool:
        """Compare deltas and whole tensors bit for bit; metadata does not count."""
        if not isinstance(other, Adapter):
            return NotImplemented
        return (
            self._deltas == other._deltas
            and self.tensors.keys() == other.tensors.keys()
            and all(same_tensor(t, other.tensors[name]) for name, t in self.tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def __repr__(self) -> str:
        whole = f", {len(self.tensors)} whole tensors" if self.tensors else ""
        return f"Adapter({len(self)} parameters, nnz={self.nnz}, density={self.density:.4g}{whole})"

    def require_sparse(self, what: str) -> None:
        """Refuse (`AdapterError`) whole tensors, for ``what`` knows deltas alone: a patch file."""
        if self.tensors:
            raise AdapterError(
                f"{what} cannot hold whole tensors, and the adapter has {listed(self.tensors)} "
                "(trained under modules_to_save). adapter.restrict(list(adapter)) is the adapter "
                "without them, which computes something else"
            )

    def require_scale_one(self, name: str, scale: float) -> None:
        """Refuse (`AdapterError`) whole tensors at another scale than 1: they have none."""
        if self.tensors and scale != 1.0:
            raise AdapterError(
                f"{name} has whole tensors ({listed(self.tensors)}), which have no scale, so it is "
                f"used at 1 and not at {scale:g}; adapter.restrict(list(adapter)) is the adapter "
                "without them"
            )

    def __mul__(self, factor: float) -> Adapter:
        """Return the adapter times a finite number, in float32, or float64 if the values are.

        An adapter with whole tensors is refused (`AdapterError`): they have no scale.
        """
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            return NotImplemented
        return _fuse([self], [factor])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Adapter:
        """Return the adapter times ``1 / divisor``."""
        if isinstance(divisor, bool) or not isinstance(divisor, numbers.Real):
            return NotImplemented
        if divisor == 0:
            raise ConfigError("an adapter cannot be divided by 0")
        return self * (1 / divisor)

    def __neg__(self) -> Adapter:
        """Return the adapter with the sign of each value changed."""
        return self * -1

    def __add__(self, other: Adapter) -> Adapter:
        """Return ``fuse([self, other])``: on the union of the positions, summed in float32.

        Whole tensors are carried; two different ones of one name are refused.
        """
        return _fuse([self, other]) if isinstance(other, Adapter) else NotImplemented

    def __radd__(self, other: object) -> Adapter:
        """Return the adapter for 0, with which ``sum(adapters)`` begins."""
        return self if other == 0 else NotImplemented

    def __sub__(self, other: Adapter) -> Adapter:
        """Return ``fuse([self, other], [1, -1])``; what cancels stays as an entry of value 0."""
        return _fuse([self, other], [1.0, -1.0]) if isinstance(other, Adapter) else NotImplemented

    def restrict(
        self,
        which: Iterable[str] | Callable[[str], bool] | Mapping[str, Support | SparseDelta],
    ) -> Adapter:
        """Return a part of the adapter; values keep their bits.

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

        return restrict(self, which)

    def prune(self, k: int | None = None, *, density: float | None = None) -> Adapter:
        """Keep the entries of largest magnitude, over all parameters together, bit for bit.

        Of equal magnitudes the first are kept. A parameter may end with no entry. Whole tensors
        stay as they are.

        Args:
            k: How many entries to keep; with as many or more, the adapter is returned as it is.
            density: Instead of k: the most that `density` of the result may be.

        Raises:
            ConfigError: If neither or both are given, or not possible.
        """
        if k is None and density is None:
            raise ConfigError("say how much is to stay: k entries, or a density")
        return _fuse([self], method="magnitude", k=k, density=density)

    def to(
        self, dtype: torch.dtype | None = None, *, device: torch.device | str | None = None
    ) -> Adapter:
        """Return the adapter in another dtype, rounded to nearest, or on another device.

        Whole tensors keep their dtype.

        Raises:
            AdapterError: If the dtype is not floating point, or a finite value is beyond its range.
        """
        from shira.fusing import cast

        return cast(self, dtype, device)

    def compare(self, other: Adapter) -> Comparison:
        """Tell in which entries and by how much two adapters differ.

        Raises:
            AdapterError: If ``other`` is no adapter.
        """
        from shira.measure import compare

        return compare(self, other)

    @classmethod
    def from_model(cls, model: torch.nn.Module, adapter_name: str = "default") -> Adapter:
        """Return an adapter of a PEFT model (or of a model with injected SHiRA layers) as a value.

        The values are copies; training on changes nothing of the result. Modules that the adapter
        trains whole (``modules_to_save``) become its `tensors`.

        Raises:
            UnknownAdapterError: If no layer of the model has an adapter of this name.
        """
        from shira.store.extract import adapter_of_model

        return adapter_of_model(model, adapter_name)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        base: Base | None = None,
        mapped: bool = False,
    ) -> Adapter:
        """Read an adapter, whatever its format: a compact file, or a folder in PEFT's.

        Everything is validated before it is returned. Memory is in proportion to the adapter.

        Args:
            path: A compact file or a folder with an ``adapter.safetensors``; or a folder in PEFT's
                format or its ``adapter_model.safetensors``.
            base: Where the shapes of the base's weights are known from, if the file does not record
                them (stock PEFT's do not): the ``nn.Module``, the path or hub name of a safetensors
                checkpoint (only headers are read; its names may have another prefix), or
                ``{parameter name: shape}``.
            mapped: Leave the values of a compact file in it, mapped into memory without a copy. The
                file must then not be written to in place as long as the adapter lives; replacing
                it as a whole, as `save` does, is safe.

        Raises:
            FileNotFoundError: If there is nothing at ``path``.
            FileFormatError: If the file is damaged, hostile or no adapter, or needs ``base``.
            WrongBaseError: If the file records other shapes than ``base`` has, or a checkpoint
                lacks a parameter.
        """
        from shira.checkpoints import shapes_of
        from shira.store import load

        known = None if base is None else partial(shapes_of, base)
        return load(path, shapes_of=known, mapped=mapped)

    def save(
        self,
        path: str | os.PathLike[str],
        format: Literal["compact", "peft"] = "compact",
        dtype: torch.dtype | None = None,
        indices: Literal["gaps", "blocks", "seed"] | None = None,
    ) -> None:
        """Write the adapter, atomically: the old file or the new one is there, never half.

        Args:
            path: A file for ``"compact"``; in a folder that is there already, the file
                ``adapter.safetensors``. A folder, made if absent, for ``"peft"``.
            format: ``"compact"``: one safetensors file, at 2 % density 3 bytes an entry with
                bfloat16 values (``docs/file-format.md``). ``"peft"``: ``adapter_config.json`` and
                ``adapter_model.safetensors``, which stock PEFT loads.
            dtype: Dtype of the stored values; ``None`` keeps theirs. ``torch.int8`` (compact only)
                keeps a scale for each parameter and loads as float32, within half a step. Whole
                tensors keep their dtype.
            indices: How a compact file stores them: as ``"gaps"``, as the numbers of ``"blocks"``,
                or as the ``"seed"`` of a random mask; ``None`` takes the smallest that is exact.

        Raises:
            ConfigError: If the format is unknown, or does not store this dtype or indices so.
            AdapterError: If the format cannot hold the adapter.
        """
        from shira.store import save

        save(self, path, format=format, dtype=dtype, indices=indices)


def _fuse(adapters: list[Adapter], *args: Any, **options: Any) -> Adapter:
    from shira.fusing import fuse

    return fuse(adapters, *args, **options)
