# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is packed: dequantize, put the adapter in, multiply, let it go.

PEFT's quantization interface says how a packed weight is unpacked (bitsandbytes 4-bit and 8-bit,
torchao). What it gives is a buffer of our own, so the k replacement values are written into it
and nothing has to be put back; the packed weight is never touched::

    forward:   B = dequantize(W);  B[S] = round(B[S] + s*v);  y = x B^T     (keeps x, v, the layer)
    backward:  the same B again for dx = g B;  dv = s * (g^T x)[S]

B is the one dense temporary of the weight's size in shira's training: O(m n) for the length of a
product, made twice a step and never kept from forward to backward. Keeping it would undo what the
quantization saves.

Merging, where it is asked for, is PEFT's: unpack, add, pack again (`repack`). The old packed weight
is kept whole, to be put back (`Packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
import torch.nn.functional as F
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from shira.errors import MergeError, TargetError
from shira.ops import plan_for, weight_gradient
from shira.ops.plain import gradients_with_a_graph, plain_weight, transforming
from shira.ops.product import no_autocast
from shira.ops.resident import delta_write
from shira.store.names import full_shape


def backend_of(layer: nn.Module, **kwargs: Any) -> Any:
    """Return PEFT's quantization backend of a base layer, or None if it is not quantized.

    PEFT's ``kwargs`` may lack torchao's way of packing again (a model quantized by hand): only
    merging needs it.
    """
    repack = kwargs.get("get_apply_tensor_subclass") or _refuse_to_repack
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=repack)


def can_unpack(backend: Any) -> bool:
    """Return whether the backend can unpack a weight (GPTQ's and AWQ's cannot)."""
    # PEFT's contract: who supports merging implements get_base_weight.
    return bool(backend.supports_merge)


def unpacked(layer: nn.Module) -> Tensor | None:
    """Return a base layer's weight, detached, to look at: a new dense one if it is packed.

    None for a packed weight whose backend cannot unpack it.
    """
    backend = backend_of(layer)
    if backend is None:
        return cast(Tensor, layer.weight).detach()
    return unpack(layer, backend) if can_unpack(backend) else None


@torch.compiler.disable(reason="a packed weight is unpacked by its own library")
def quantized_linear(
    x: Tensor, layer: nn.Module, backend: Any, deltas: Sequence[Tensor], indices: Sequence[Tensor]
) -> Tensor:
    """Compute ``x W'^T + bias``, W' the unpacked weight with every delta at its positions.

    In the layer's ``compute_dtype``, if it has one (bitsandbytes 4-bit), else in that of
    ``x``. An ``autograd.Function`` that keeps the layer, not a custom op, as an op takes no module:
    under ``torch.compile`` the graph breaks around it.
    """
    dtype = getattr(layer, "compute_dtype", None) or x.dtype
    bias = cast("Tensor | None", layer.bias)
    bias = None if bias is None else bias.to(dtype)
    if transforming():
        result = _plain(x.to(dtype), bias, layer, backend, deltas, indices)
    else:
        result = _Linear.apply(x.to(dtype), bias, layer, backend, *deltas, *indices)
    return result.to(x.dtype)


def _plain(
    x: Tensor, bias: Tensor | None, layer: nn.Module, backend: Any, deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Return the same product by ops of torch's that have all derivatives."""
    with no_autocast(x):
        dense = unpack(layer, backend).to(x.dtype).contiguous()
        return F.linear(x, plain_weight(dense, deltas, indices), bias)


class _Linear(torch.autograd.Function):
    # The layer is kept, not its weight: FSDP2 and offloading put other tensors into a module
    # between forward and backward.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module, backend: Any, *rest: Tensor
    ) -> Tensor:
        # x is what the values' gradient needs; without it it is not kept alive
        keeps_x = any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(x if keeps_x else x.new_empty(0), *rest)
        ctx.layer, ctx.backend = layer, backend
        with no_autocast(x):
            return F.linear(x, _adapted(layer, backend, *_halves(rest), x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        deltas, indices = _halves(rest)
        need_x, need_bias, _, _, *need_rest = ctx.needs_input_grad
        left = grad.reshape(-1, grad.shape[-1])
        dvalues: Sequence[Tensor | None] = [None] * len(deltas)
        dx = dbias = None
        shape = full_shape(ctx.layer.weight)
        if torch.is_grad_enabled():  # a graph of this pass is wanted
            if not any(need_rest):  # x was not kept; its gradient is the same at any x
                x = grad.new_zeros(*grad.shape[:-1], shape[1]).requires_grad_()

            def product(x: Tensor, *deltas: Tensor) -> Tensor:
                return _plain(x, None, ctx.layer, ctx.backend, deltas, indices)

            each = need_x, *need_rest[: len(deltas)]
            dx, *dvalues = gradients_with_a_graph(product, (x, *deltas), each, grad)
            dbias = left.sum(0) if need_bias else None
            return dx, dbias, None, None, *dvalues, *(None,) * len(indices)
        with no_autocast(grad):
            if any(need_rest):
                plan = plan_for(indices, shape, (shape[1], 1))
                values = weight_gradient(left, x.reshape(-1, x.shape[-1]), plan)
                dvalues = plan.split(values, deltas)
            if need_x:  # last: the dense weight is not there while the others need room
                dx = grad @ _adapted(ctx.layer, ctx.backend, deltas, indices, grad.dtype)
            if need_bias:
                dbias = left.sum(0)
        return dx, dbias, None, None, *dvalues, *(None,) * len(indices)


def _halves(rest: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return deltas and indices, one of each for an adapter."""
    return rest[: len(rest) // 2], rest[len(rest) // 2 :]


def _adapted(
    layer: nn.Module,
    backend: Any,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Return the dense weight with the deltas inside, made anew at each call."""
    dense = unpack(layer, backend).to(dtype).contiguous()
    plan = plan_for(indices, dense.shape, dense.stride())
    delta_write(dense, plan, plan.combine(deltas)).put_in()
    return dense


def unpack(layer: nn.Module, backend: Any) -> Tensor:
    """Return the dense weight, new and detached, in the dtype it had before it was packed."""
    weight = cast(Tensor, layer.weight)
    state = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return _from_cpu_layout(weight.data, state)
    dense: Tensor = backend.get_base_weight(layer)
    shape = full_shape(weight)
    if tuple(dense.shape) != shape:
        raise TargetError(
            f"the quantized weight was unpacked to shape {tuple(dense.shape)}, not {shape}"
        )
    return dense.detach()


def can_repack(backend: Any) -> bool:
    """Return whether the backend can pack a weight again."""
    how = getattr(backend, "get_apply_tensor_subclass", None)  # torchao's
    return can_unpack(backend) and how is not _refuse_to_repack


class Packed:
    """A base layer as it is, with its packed weight: backends replace either of them."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.base = layer, layer.get_base_layer()
        self.keep()

    def keep(self) -> None:
        """Take note of the base layer as it is now."""
        self.settings = [(where, dict(where)) for where in self._held()]

    def _held(self) -> list[dict[str, Any]]:
        module = self.base
        # bitsandbytes keeps scales in attributes of the weight, and in a state beside it
        parts = [module.__dict__, module._parameters, module._buffers, vars(module.weight)]
        return [*parts, vars(module.state)] if hasattr(module, "state") else parts

    def put_back(self) -> None:
        """Make the layer hold the very objects of before; in training or not as it is now."""
        training = self.layer.get_base_layer().training
        if self.layer._modules["base_layer"] is not self.base and hasattr(self.base, "dequantize"):
            self.layer.base_layer = self.base  # HQQ's is another
        for where, before in self.settings:
            where.clear()
            where.update(before)
        self.base.training = training


class Repacked(NamedTuple):
    """The count of what packing a weight again has done."""

    nonzero: int  # deltas other than zero
    lost: int  # those of them whose entry is what it was
    beside: int  # entries without a delta that have changed
    entries: int


def repack(
    layer: Any,
    backend: Any,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    check: Callable[[Tensor], None] | None,
) -> Repacked:
    """Unpack a layer's weight, write the deltas into it, and pack it again, as PEFT's LoRA does.

    Three dense weights at a time: of before, with the deltas, and unpacked again, to compare.
    ``check`` is called with the values that are to be written.

    Raises:
        MergeError: If the backend fails; the layer is to be put back then.
    """
    base = layer.get_base_layer()
    old = unpack(base, backend).contiguous()
    dense = old.clone()
    plan = plan_for(indices, dense.shape, dense.stride())
    combined = plan.combine(deltas)
    delta_write(dense, plan, combined).put_in()
    flat = plan.flat().long().to(old.device)
    if check is not None:
        check(dense.view(-1)[flat])
    try:
        backend.set_base_weight(layer, dense)
    except Exception as error:
        raise MergeError(
            f"{layer.weight_name}: {type(error).__name__} in packing it again: {error}"
        ) from error
    changed = unpack(layer.get_base_layer(), backend).to(old).reshape(-1) != old.view(-1)
    nonzero = combined.to(old.device) != 0
    lost = int((nonzero & ~changed[flat]).sum())
    beside = int(changed.sum()) - int(changed[flat].sum())
    return Repacked(int(nonzero.sum()), lost, beside, old.numel())


def _from_cpu_layout(packed: Tensor, state: Any) -> Tensor:
    """Unpack 4-bit values from the layout that bitsandbytes gives a weight that infers on a CPU.

    On processors with AVX512-BF16 the layer's own forward in eval mode packs the weight anew, 32
    rows side by side, and rounds the scales to bfloat16; ``dequantize_4bit`` takes no notice.
    """
    rows, cols = state.shape
    pairs = packed.view(torch.uint8).reshape(-1, 32)
    codes = torch.cat((pairs & 0xF, pairs >> 4), 1).view(rows // 32, cols // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(rows, cols // state.blocksize, state.blocksize)
    values: Tensor = state.code.float()[codes.int()] * state.absmax.t().float().unsqueeze(2)
    return values.view(rows, cols).to(state.original_dtype)


def _refuse_to_repack(*args: Any, **kwargs: Any) -> NoReturn:
    raise MergeError("this model was quantized by hand, so how to pack it again is not known")
