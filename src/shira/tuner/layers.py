# SPDX-License-Identifier: Apache-2.0
"""The adapted layer types, one class each: `Linear`, `Convolution`, `Embedding`.

A type says which base layers it adapts, and computes their product with the deltas inside the
weight. To add one, write its class, here or in a file of its own, and put it into `LAYERS`.

In a mixed batch (``adapter_names=``) the base is computed once for all samples, where that is
cheaper, and a type puts each adapter's k entries on top for the samples that want it. An embedding
is then the merged table's look-up bit for bit; a linear layer rounds as `shira.ops.add_products`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shira import ops
from shira.base import replacement
from shira.support import matrix_shape
from shira.tuner.base_layer import Way, members, weight_of
from shira.tuner.layer import ShiraLayer
from shira.tuner.mixed_batch import Ready, Rows
from shira.tuner.quantized import backend_of, can_unpack, quantized_linear


class Linear(ShiraLayer):
    """SHiRA in a linear layer, its weight stored ``[out, in]`` or (``Conv1D``) ``[in, out]``."""

    base_types = (nn.Linear, Conv1D)
    known_forwards = frozenset({nn.Linear.forward, Conv1D.forward})
    whole_product_from = 512
    """A product with the adapter inside the weight costs its scatter and restore, O(k), once; base
    and delta apart cost O(tokens * k) more. Measured on two CPU cores (``python -m benchmarks
    mixed_batch``)."""

    def _stores_input_first(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: LoRA has factors for every linear layer."""
        return True

    def _product(self, deltas: list[Tensor], indices: list[Tensor], x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        weight, bias = members(base, "weight", "bias")
        x = self._cast_input(x, weight)
        backend = self.quantization_backend
        if backend is not None and can_unpack(backend):
            return quantized_linear(x, base, backend, deltas, indices)  # type: ignore[no-any-return]
        if backend is not None:
            # A weight that cannot be unpacked (GPTQ, AWQ, ...): the delta alone, on a weight of
            # zeros that takes no memory, is added to what the base layer computes.
            zeros = x.new_zeros(()).expand(self.weight_shape)
            delta = ops.linear(x, zeros, None, deltas, indices)
            return delta + self._base_forward(x)  # type: ignore[no-any-return]
        return ops.linear(x, weight, bias, deltas, indices, transposed=self.fan_in_fan_out)

    def _on_top(self, adapters: list[str], rows: Rows, x: Tensor, result: Tensor) -> Tensor:
        deltas, indices = self._in_use(adapters)
        shape, transposed = matrix_shape(self.weight_shape), self.fan_in_fan_out
        groups = ops.DeltaGroups(rows.counts, deltas, indices, shape, transposed=transposed)
        ready = Ready(x.shape, x.dtype, adapters, rows, groups)
        if groups.lasting and self._is_as_before(ready):
            rows.ready[self] = ready
        return groups.add(result, x, rows.order)

    def _is_as_before(self, ready: Ready) -> bool:
        """Return whether the layer would find the same now: `mixed_batch_forward` goes by it."""
        base: Any = self._modules["base_layer"]
        adapters = ready.adapters
        if self._way(base) is not Way.DIRECT or weight_of(self).dtype != ready.dtype:
            return False
        if max(ready.rows.counts) >= self.whole_product_from:
            return False
        if {*map(self.scaling.get, adapters)} != {1.0}:  # scaled values are copies
            return False
        deltas = [*map(self.shira_weight._parameters.get, adapters)]
        indices = [*map(self.shira_indices._buffers.get, adapters)]
        return ready.groups.the_same(deltas, indices)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV_FORWARDS = {kind._conv_forward for kind in _CONVOLUTIONS}


class Convolution(ShiraLayer):
    """SHiRA in a convolution of one to three dimensions, transposed ones included.

    Its weight is stored ``[out, in / groups, *kernel]``; transposed, ``[in, out / groups,
    *kernel]``.
    """

    base_types = (*_CONVOLUTIONS, *_TRANSPOSED)
    known_forwards = frozenset(kind.forward for kind in base_types)

    def _stores_input_first(self) -> bool:
        return isinstance(self.get_base_layer(), _TRANSPOSED)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether PEFT's LoRA computes what this layer does; see `no_lora`."""
        return not self.no_lora()

    def no_lora(self) -> str:
        """Return why PEFT's LoRA cannot hold an adapter of this layer; empty if it can."""
        base: Any = self.get_base_layer()
        if base.transposed:
            return "has no transposed convolutions"
        if base.padding_mode != "zeros" and any(base._reversed_padding_repeated_twice):
            return f"pads with zeros, and this layer with padding_mode={base.padding_mode!r}"
        if any(
            step > 1 and size > 1
            for step, size in zip(base.dilation, base.kernel_size, strict=True)
        ):
            return f"leaves out the dilation, which is {base.dilation} here"
        return ""

    def _way(self, base: Any) -> Way:
        # which torch's own forwards call, but for those of the transposed
        known = base.transposed or type(base)._conv_forward in _CONV_FORWARDS
        return super()._way(base) if known else Way.OWN

    def _product(
        self, deltas: list[Tensor], indices: list[Tensor], x: Tensor,
        output_size: list[int] | None = None,
    ) -> Tensor:  # fmt: skip
        base: Any = self.get_base_layer()
        weight, bias = members(base, "weight", "bias")
        x = self._cast_input(x, weight)
        window: dict[str, Any] = {
            "stride": base.stride,
            "padding": base.padding,
            "dilation": base.dilation,
        }
        if base.transposed:
            dims = weight.dim() - 2
            sizes = base.stride, base.padding, base.kernel_size, dims, base.dilation
            window["output_padding"] = base._output_padding(x, output_size, *sizes)
        elif base.padding_mode != "zeros":
            # as nn.Conv2d itself does
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            window["padding"] = 0
        options = {"transposed": base.transposed, "groups": base.groups}
        return ops.convolution(x, weight, bias, deltas, indices, **options, **window)


class Embedding(ShiraLayer):
    """SHiRA in a look-up table, its weight stored ``[rows, dim]``."""

    base_types = (nn.Embedding,)
    known_forwards = frozenset({nn.Embedding.forward})
    whole_product_from = math.inf

    def _stores_input_first(self) -> bool:
        return True  # rows are looked up by the input

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: LoRA has factors for an embedding."""
        return True

    def _way(self, base: Any) -> Way:
        # a gradient that is scaled by frequency is left to torch
        return Way.OWN if base.scale_grad_by_freq else super()._way(base)

    def _cast_input(self, x: Tensor, weight: Tensor) -> Tensor:
        return x  # row numbers

    def _product(self, deltas: list[Tensor], indices: list[Tensor], x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        return ops.embedding(x, base.weight, deltas, indices, padding_idx=base.padding_idx)

    def _on_top(self, adapters: list[str], rows: Rows, x: Tensor, result: Tensor) -> Tensor:
        shape, ids = result.shape, x.reshape(-1)
        result = result.reshape(-1, shape[-1])
        for adapter, at in zip(adapters, rows.order.split(rows.counts), strict=True):
            part = self._replaced(adapter, ids.index_select(0, at), result.index_select(0, at))
            result = result.index_copy_(0, at, part)
        return result.view(shape)

    def _replaced(self, adapter: str, ids: Tensor, result: Tensor) -> Tensor:
        """Return what the base looked up, ``(tokens, dim)``, with an adapter's entries in it."""
        padding_idx: int | None = self.get_base_layer().padding_idx  # type: ignore[assignment]
        indices = self.shira_indices.kept(adapter)
        place, entry = ops.looked_up(ids, indices, self.weight_shape)
        delta = self._delta(adapter).index_select(0, entry)
        if padding_idx is not None and delta.requires_grad:  # that row gets no gradient
            row = self.shira_indices[adapter][0].index_select(0, entry)
            delta = torch.where(row == padding_idx, delta.detach(), delta)
        flat = result.view(-1)
        new = replacement(flat.index_select(0, place), delta)
        return flat.index_copy(0, place, new).view(result.shape)


LAYERS: tuple[type[ShiraLayer], ...] = (Linear, Convolution, Embedding)
"""The adapted layer types; the first that adapts a base layer is taken."""


def layer_class_of(module: nn.Module) -> type[ShiraLayer] | None:
    """Return the adapted layer type for a base layer, or None if SHiRA has none for it."""
    for layer_class in LAYERS:
        if isinstance(module, layer_class.base_types):
            return layer_class
    backend = backend_of(module)
    return Linear if backend is not None and backend.layer_type == "linear" else None
