# SPDX-License-Identifier: Apache-2.0
"""`AdaptedWeight`: the weight of an adapted layer, as seen by code that reads it.

A layer whose class has a forward of its own reads its weight, and so do modules that compute with
the weight of another: ``F.linear(x, self.fc.weight)``. Both get a tensor that has no memory. It
answers for shape, dtype and device from the base weight; in ``F.linear``, ``F.embedding``, torch's
convolutions and matrix products it is the product of `shira.ops`, at no cost of its own. So are the
products of a mixture's experts: with a matrix of a stack, or with all of them in groups of rows
(``grouped_mm``, ``bmm``). Anything else is done with a copy of the weight that holds the adapter
(`shira.ops.adapted_weight`). The gradient comes back to the adapter's values in each case. Nothing
writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from shira import ops
from shira.errors import AdapterError, TargetError
from shira.ops.product import runs_eagerly
from shira.store.names import is_sharded
from shira.tuner.quantized import can_unpack, unpack


class Inside(NamedTuple):
    """The parts of a layer that an `AdaptedWeight` needs; not the layer, which may keep it."""

    weight_name: str
    base_layer: nn.Module
    backend: Any
    """Of its quantization, or None."""
    indices: list[Tensor]


def adapted_weight(weight: Tensor, deltas: Sequence[Tensor], inside: Inside) -> Tensor:
    """Return an `AdaptedWeight`; where torch traces instead of computing, a plain tensor.

    No deltas at all stand for a batch in which samples have their own: there is no such weight, and
    computing with the result is an error.
    """
    if not runs_eagerly(*deltas):
        return _made(weight, deltas, inside)
    return _reading(weight, deltas, inside, False)


def _reading(weight: Tensor, deltas: Sequence[Tensor], inside: Inside, flipped: bool) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *deltas)):
        return _read(inside, flipped, weight, *deltas)  # type: ignore[no-any-return]
    return AdaptedWeight(weight, deltas, inside, flipped)


class LatestReading:
    """The latest `AdaptedWeight` of a layer, given out again while nothing has changed."""

    def __init__(self) -> None:
        self._kept: tuple[list[Any], Tensor] | None = None

    def __reduce__(self) -> Any:
        return LatestReading, ()  # a copy of the layer reads its own

    def adapted_weight(self, weight: Tensor, deltas: Sequence[Tensor], inside: Inside) -> Tensor:
        """Return the latest reading, or `adapted_weight` anew if anything it depends on changed."""
        if not runs_eagerly(*deltas):
            return adapted_weight(weight, deltas, inside)
        key = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), weight.device]
        key += [*versions_of(weight, *deltas), *map(id, inside.indices)]
        key += [(id(t), t.requires_grad, t.dtype) for t in (weight, *deltas)]
        kept = self._kept  # once: another thread may put its own in the place
        if kept is not None and kept[0] == key:
            return kept[1]
        reading = adapted_weight(weight, deltas, inside)
        # A scale makes a new delta at each reading, and puts a node of its own in the graph.
        if all(isinstance(delta, nn.Parameter) for delta in deltas):
            self._kept = key, reading
        return reading


class AdaptedWeight(Tensor):
    """A weight with adapters inside; made by `adapted_weight`."""

    _weight: Tensor
    _deltas: Sequence[Tensor]
    _inside: Inside
    _seen: list[int | None]
    """`versions_of` weight and deltas when it was read."""
    _shape: torch.Size
    _flipped: bool
    """It is the transposed weight: the last two dimensions have changed places."""
    _parts: dict[Any, list[tuple[Tensor, ...]]]
    """Each delta matrix by matrix, with and without a graph: see `_matrix`."""

    @staticmethod
    def __new__(
        cls, weight: Tensor, deltas: Sequence[Tensor], inside: Inside, flipped: bool = False
    ) -> AdaptedWeight:
        """Return a tensor of the weight's shape, without memory."""
        shape, stride = weight.shape, weight.stride()
        if flipped:
            shape, stride = weight.mT.shape, weight.mT.stride()
        layout: Any = {"strides": stride, "dtype": weight.dtype, "device": weight.device}
        self: AdaptedWeight = Tensor._make_wrapper_subclass(cls, shape, **layout)
        self._weight, self._deltas, self._inside = weight, deltas, inside
        self._seen, self._flipped, self._parts = versions_of(weight, *deltas), flipped, {}
        self._shape = shape
        return self

    # The three that models ask for at each forward, without the detour of __torch_function__.
    dtype = property(lambda self: self._weight.dtype)  # type: ignore[assignment]
    device = property(lambda self: self._weight.device)  # type: ignore[assignment]
    shape = property(lambda self: self._shape)  # type: ignore[assignment]

    @classmethod
    @torch.compiler.disable(reason="a compiled function that gets it computes with the copy")
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _OF_THE_BASE:
            return func(args[0]._weight, *args[1:], **kwargs)
        if func in _DETACHED:  # with the memory of a copy, what is written to it would be lost
            read = args[0]
            deltas = [delta.detach() for delta in read._deltas]
            return AdaptedWeight(read._weight.detach(), deltas, read._inside, read._flipped)
        if product := _PRODUCTS.get(func):
            result = product(*args, **kwargs)
            if result is not None:
                return result
        _refuse_writing(func, args, kwargs)
        args, kwargs = tree_map_only(AdaptedWeight, AdaptedWeight._plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # What comes here went past __torch_function__; its gradient is that of `_Reading`.
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                _refuse_if_ours(value)
        args, kwargs = tree_map_only(AdaptedWeight, AdaptedWeight._plain, (args, kwargs))
        return func(*args, **kwargs)

    def _plain(self) -> Tensor:
        self._check()
        made = _made(self._weight, self._deltas, self._inside)
        return made.mT if self._flipped else made

    def _check(self) -> None:
        """Refuse to compute with what is not one weight, or no longer that of the forward."""
        _refuse_several(self._deltas, self._inside)
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self._seen != versions_of(self._weight, *self._deltas):
            raise AdapterError(
                f"{self._inside.weight_name}: the base weight or the values of an adapter in it "
                "were written to between a forward that read the weight and its backward, which "
                "needs it as it was; call backward before optimizer.step(), merge_adapter() and "
                "the like"
            )


class _Reading(torch.autograd.Function):
    """An `AdaptedWeight` with a place in the graph, for code that autograd alone can follow.

    Such as an ``autograd.Function`` that is given the weight and returns its gradient. It saves
    nothing, so any number of backward passes go through it.
    """

    @staticmethod
    def forward(ctx: Any, inside: Inside, flipped: bool, weight: Tensor, *deltas: Tensor) -> Tensor:
        ctx.inside, ctx.flipped, ctx.deltas = inside, flipped, deltas
        return AdaptedWeight(weight, deltas, inside, flipped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad = grad.mT if ctx.flipped else grad
        gradients = ops.value_gradients(grad, ctx.deltas, ctx.inside.indices)
        return None, None, grad if ctx.needs_input_grad[2] else None, *gradients


# The class method of `Function`, without what it does for functorch and for a setup_context.
_read: Any = super(torch.autograd.Function, _Reading).apply


def versions_of(*tensors: Tensor) -> list[int | None]:
    """Return autograd's counts of writes to some tensors; None where it keeps none."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def product_input(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return the input of a product in the dtype that torch would take, or None if it would refuse.

    Autocast's, if that is on (it leaves float64 alone); else the weight's, which ``x`` must have.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weight.dtype):
        return x.to(torch.get_autocast_dtype(kind))
    return x if x.dtype == weight.dtype else None


def _made(weight: Tensor, deltas: Sequence[Tensor], inside: Inside) -> Tensor:
    """Return a differentiable copy of the weight with the adapters inside."""
    backend = inside.backend
    _refuse_several(deltas, inside)
    if is_sharded(weight) or (backend is not None and not can_unpack(backend)):
        raise TargetError(
            f"{inside.weight_name}: another module computes with the weight of this adapted layer, "
            "which this process has a part of only, or which cannot be unpacked; leave it out of "
            "target_modules"
        )
    if backend is not None:
        weight = unpack(inside.base_layer, backend)
    return ops.adapted_weight(weight, deltas, inside.indices)


def _refuse_several(deltas: Sequence[Tensor], inside: Inside) -> None:
    if not deltas:
        raise AdapterError(
            f"{inside.weight_name}: another module computes with the weight of this adapted layer, "
            "which is one for the whole batch; `adapter_names` must be all the same"
        )


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    x = _input_of(input, weight, bias)
    if x is None:
        return None
    return ops.linear(x, weight._weight, bias, weight._deltas, weight._inside.indices)


def _convolution(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    x = _input_of(input, weight, bias)
    if x is None:
        return None
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    base, indices = weight._weight, weight._inside.indices
    return ops.convolution(x, base, bias, weight._deltas, indices, **options)


def _transposed_convolution(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    x = _input_of(input, weight, bias)
    if x is None:
        return None
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"transposed": True, "output_padding": output_padding}
    base, indices = weight._weight, weight._inside.indices
    return ops.convolution(x, base, bias, weight._deltas, indices, **options)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if not _is_ours(weight) or _is_ours(input) or max_norm is not None or scale_grad_by_freq:
        return None
    if weight._flipped:
        return None
    weight._check()
    base, indices = weight._weight, weight._inside.indices
    if padding_idx is not None and padding_idx < 0:
        padding_idx += base.shape[0]
    return ops.embedding(input, base, weight._deltas, indices, padding_idx=padding_idx)


def _matmul(input: Any, other: Any) -> Tensor | None:
    if not _is_ours(other) or not isinstance(input, Tensor):
        return None
    if other.dim() == 3 and input.dim() == 3 and len(input) == len(other):
        return _in_groups(torch.matmul, input, other)
    x = _input_of(input, other, None, other._flipped)
    if other.dim() != 2 or input.dim() < 2 or x is None:
        return None
    inside, flipped = other._inside, other._flipped
    deltas, indices = other._deltas, inside.indices
    return ops.linear(x, other._weight, None, deltas, indices, transposed=not flipped)


def _bmm(input: Any, mat2: Any) -> Tensor | None:
    if not _is_ours(mat2) or len(input) != len(mat2):
        return None
    return _in_groups(torch.bmm, input, mat2)


def _in_groups(product: Any, input: Any, weight: Any) -> Tensor | None:
    """Compute a product of as many matrices as the stack has, each with its own."""
    x = _input_of(input, weight, None, weight._flipped)
    if x is None or not _takes_groups(x, weight):
        return None
    ends = [at * x.shape[1] for at in range(len(x) + 1)]
    return _grouped(product, x, weight, lambda: [*pairwise(ends)])


def _grouped_mm(function: Any) -> Callable[..., Tensor | None]:
    def product(
        mat_a: Any, mat_b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
    ) -> Tensor | None:
        x = _input_of(mat_a, mat_b, bias, getattr(mat_b, "_flipped", False))
        plain = isinstance(offs, Tensor) and bias is None and out_dtype is None
        # autocast leaves these alone
        if x is None or x.dtype != mat_a.dtype or x.dim() != 2 or not plain:
            return None
        if mat_a.dtype != mat_b.dtype or not _takes_groups(x, mat_b):
            return None
        return _grouped(
            lambda x, stack: function(x, stack, offs=offs),
            *(x, mat_b, lambda: [*pairwise([0, *offs.tolist()])]),
        )

    return product


def _takes_groups(x: Tensor, weight: Any) -> bool:
    base = weight._weight
    return base.dim() == 3 and not base.requires_grad and runs_eagerly(x, base, *weight._deltas)


def _grouped(product: Any, x: Tensor, weight: Any, rows: Any) -> Tensor:
    base, deltas, indices = weight._weight, weight._deltas, weight._inside.indices
    return ops.grouped(product, x, base, deltas, indices, rows, transposed=weight._flipped)


def _matrix(weight: Any, index: Any) -> Tensor | None:
    """Return a matrix of a stack, itself an `AdaptedWeight`: the deltas are cut, not made anew."""
    if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
        index = None if index.dtype == torch.bool else int(index)
    known = isinstance(index, int) and not isinstance(index, bool)
    if not known or not _is_ours(weight) or weight.dim() != 3 or weight._inside.backend is not None:
        return None
    base = weight._weight
    if not -len(base) <= index < len(base) or not runs_eagerly(base, *weight._deltas):
        return None
    index %= len(base)
    return _piece(weight, base[index], index, None, f"[{index}]")


def _chunk(input: Any, chunks: int, dim: int = 0) -> Any:
    return _split(input, max(1, -(-len(input._weight) // chunks)), dim) if chunks > 0 else None


def _split(tensor: Any, sizes: Any, dim: int = 0) -> Any:
    """Return rows of a matrix, as an attention takes them: each an `AdaptedWeight`."""
    weight, base = tensor, tensor._weight
    if isinstance(sizes, int):
        sizes = [min(sizes, len(base) - at) for at in range(0, len(base), sizes)] if sizes else []
    known = base.dim() == 2 and dim in (0, -2) and not weight._flipped
    if not known or weight._inside.backend is not None or sum(sizes) != len(base):
        return None
    if min(sizes) < 0 or not runs_eagerly(base, *weight._deltas):
        return None
    rows, starts = tuple(sizes), [0, *accumulate(sizes)]
    return tuple(
        _piece(weight, base[first:last], at, rows, f"[{first}:{last}]")
        for at, (first, last) in enumerate(pairwise(starts))
    )


def _piece(weight: Any, base: Tensor, at: int, rows: tuple[int, ...] | None, where: str) -> Tensor:
    """Return a piece of a weight with the entries that are in it: see `shira.ops.pieces_of`."""
    weight._check()
    whole, inside = weight._weight, weight._inside
    pieces = [
        ops.pieces_of(ops.plan_for([positions], whole.shape, whole.stride()), rows)
        for positions in inside.indices
    ]
    parts = weight._parts.setdefault((torch.is_grad_enabled(), rows), [])
    if not parts:
        parts += [
            torch.split(delta, piece.sizes)
            for delta, piece in zip(weight._deltas, pieces, strict=True)
        ]
    here = inside._replace(
        weight_name=f"{inside.weight_name}{where}", indices=[piece.indices[at] for piece in pieces]
    )
    return _reading(base, [part[at] for part in parts], here, weight._flipped)


def _transposed(weight: Any, dim0: int = -2, dim1: int = -1) -> Tensor | None:
    """Return the weight with its last two dimensions in each other's place."""
    rank = weight.dim()
    last = sorted(dim % rank for dim in (dim0, dim1) if -rank <= dim < rank)
    if rank not in (2, 3) or last != [rank - 2, rank - 1] or weight._inside.backend is not None:
        return None
    weight._check()
    return _reading(weight._weight, weight._deltas, weight._inside, not weight._flipped)


def _of_matrix(weight: Any) -> Tensor | None:
    return _transposed(weight) if weight.dim() == 2 else None


# torch's function asks first whether one of its arguments has a say in what is done with all of
# them. Told that none has, it hands them on, and ``F.linear``, which it calls, asks again.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda arguments: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _positional(product: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Return a product of functions whose arguments have other names."""
    return lambda *args, **kwargs: None if kwargs else product(*args)


def _getters(names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names.split()}


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution
    ),
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **{
        function: _positional(product)
        for product, functions in (
            (_matmul, (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)),
            (_bmm, (torch.bmm, Tensor.bmm)),
            (_matrix, (Tensor.__getitem__,)),
            (_transposed, (torch.transpose, Tensor.transpose, *_getters("mT"))),
            (_of_matrix, (torch.t, Tensor.t, *_getters("T"))),
        )
        for function in functions
    },
}
"""Products that `shira.ops` has, and views; None means to take the copy of the weight."""

for _function in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)):
    if _function is not None:
        _PRODUCTS[_function] = _grouped_mm(_function)


def add_grouped_product(function: Any) -> None:
    """Have a function ``(x, stack, offs=...)`` computed as ``grouped_mm`` is."""
    _PRODUCTS[function] = _grouped_mm(function)


def _input_of(x: Any, weight: Any, bias: Any, flipped: bool = False) -> Tensor | None:
    ours = _is_ours(weight) and not _is_ours(x) and not _is_ours(bias)
    if not ours or weight._inside.backend is not None or weight._flipped != flipped:
        return None
    weight._check()
    return product_input(x, weight._weight)


def _is_ours(value: Any) -> bool:
    return isinstance(value, AdaptedWeight)


def _methods(names: str) -> set[Any]:
    return {getattr(Tensor, name) for name in names.split()}


_METADATA = {
    torch.is_floating_point,
    torch.is_complex,
    torch.is_inference,
    torch.numel,
    *_getters("dtype device shape ndim layout requires_grad is_leaf grad_fn is_meta is_cpu"),
    *_getters("is_cuda is_mps is_xpu is_sparse is_quantized is_nested itemsize nbytes _version"),
    *_methods("size stride dim ndimension numel nelement is_floating_point is_complex is_signed"),
    *_methods("is_contiguous element_size storage_offset get_device is_inference __len__"),
}
_SETTER = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_OF_THE_BASE = {Tensor.requires_grad_, _SETTER, *_getters("grad")}
"""Freezing a layer's weight is freezing the base's."""
_DETACHED = {torch.detach, *_methods("detach"), *_getters("data")}
_POINTERS = _methods(
    "data_ptr storage untyped_storage register_hook retain_grad register_post_accumulate_grad_hook"
)
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_WRITES = {"__set__", "__delete__", "__setitem__", *(f"__i{name}__" for name in _IN_PLACE)}


def _refuse_writing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    name: str = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _WRITES or func in _POINTERS:
        _refuse_if_ours(args[0] if args else None)
    _refuse_if_ours(kwargs.get("out"))


def _refuse_if_ours(value: Any) -> None:
    if isinstance(value, AdaptedWeight):
        raise AdapterError(
            f"{value._inside.weight_name}: the weight of an adapted layer is made from the base "
            "weight and the adapter whenever it is read, so it cannot be written to, hooked or "
            "addressed by pointer; the base weight is layer.get_base_layer().weight, the trained "
            "values are layer.shira_weight"
        )
