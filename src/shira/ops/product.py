# SPDX-License-Identifier: Apache-2.0
"""`Product`: a differentiable product with a weight that holds adapters, made a torch op.

A ``torch.library`` custom op that mutates nothing seen from outside: compile, export,
checkpointing and FSDP2 treat it like any other. Saved for backward are the input and the values,
never the weight's adapted entries: the weight is put into the adapted state again for ``dx``.

Where torch runs ops one by one, the same two functions are called through an `autograd.Function`
instead: the machinery around a custom op, its code and data fetched anew after each large product,
was measured at a tenth of a 1024 x 1024 layer's step.

Derivatives beyond that of a backward pass are taken through `shira.ops.plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from shira.ops.plain import gradients_with_a_graph, plain_weight, transforming
from shira.ops.plan import Plan, plan_for
from shira.ops.resident import resident

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor[] deltas, Tensor[] indices"
_GRADIENT_ARGUMENTS = "Tensor grad, Tensor x, Tensor weight, Tensor[] deltas, Tensor[] indices"
_PLAIN = (Tensor, torch.nn.Parameter)
Options = Sequence[Any]
Within = Callable[[Callable[[Tensor], Any]], Any]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Product:
    """A kind of product; instances are called as ``(x, weight, bias, deltas, indices, *options)``.

    Subclasses say how it is computed with a weight that holds the adapters, and its gradients.
    Autocast is off in all of their methods.

    Args:
        name: Of the custom op: ``shira::<name>``, and ``shira::<name>_backward``.
        options: Schema of what follows the indices: ``"bool transposed"``.
    """

    keeps_x = False
    """True if the gradient of x needs x."""

    def forward(self, x: Tensor, bias: Tensor | None, options: Options, weight: Tensor) -> Tensor:
        """Return the product with an adapted weight, of the dtype of x if that is floating."""
        raise NotImplementedError

    def gradients(
        self, grad: Tensor, x: Tensor, options: Options, weight: Tensor, within: Within,
        plan: Plan, needs: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        """Return ``dx``, dense ``dweight`` and, at the plan's entries, ``dvalues``, as needed.

        ``weight`` is the base; ``within`` calls a function with the adapted weight. ``x`` is there
        if weight or values need it, or by `keeps_x`.
        """
        raise NotImplementedError

    def fake_dx(self, grad: Tensor, x: Tensor, options: Options, weight: Tensor) -> Tensor:
        """Return an empty ``dx``, for tracing."""
        raise NotImplementedError

    def dbias(self, grad: Tensor) -> Tensor:
        """Return the gradient of the bias, which lies along the last dimension."""
        return grad.reshape(-1, grad.shape[-1]).sum(0)

    # --- eagerly ----------------------------------------------------------------------------------

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[Tensor],
        indices: Sequence[Tensor], *options: Any,
    ) -> Tensor:  # fmt: skip
        """Compute the product."""
        if not runs_eagerly(x, weight, *deltas):
            if transforming():
                return self._plain(x, weight, bias, deltas, indices, options)
            return self._op(x, weight, bias, list(deltas), list(indices), *options)  # type: ignore[no-any-return]
        if torch.is_grad_enabled():
            return _apply(self, options, bias, x, weight, *deltas, *indices)  # type: ignore[no-any-return]
        plan = plan_for(indices, weight.shape, weight.stride())
        return self._compute(x, weight, bias, deltas, plan, options)

    def _compute(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[Tensor], plan: Plan,
        options: Options,
    ) -> Tensor:  # fmt: skip
        if torch._C._is_any_autocast_enabled() and _casts(x):
            with no_autocast(x):
                return self._compute(x, weight, bias, deltas, plan, options)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        dtype = x.dtype if x.is_floating_point() else weight.dtype
        result = resident(weight, plan, deltas, dtype, partial(self.forward, x, bias, options))
        # Autograd lets nobody write to a view that was made inside an op.
        if result._is_view():
            result = result.new_empty(0).set_(result)  # type: ignore[call-overload]
        return result

    def _gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, deltas: Sequence[Tensor], plan: Plan,
        options: Options, needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Return ``dx, dweight, *dvalues``, those of x, weight and values that are needed."""
        if torch._C._is_any_autocast_enabled() and _casts(grad):
            with no_autocast(grad):
                return self._gradients(grad, x, weight, deltas, plan, options, needs)
        within = partial(resident, weight, plan, deltas, grad.dtype)
        dx, dweight, values = self.gradients(grad, x, options, weight, within, plan, needs)
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        if values is None:
            return dx, dweight, *[None] * len(deltas)
        return dx, dweight, *plan.split(values, deltas)

    # --- by ops that have all derivatives ---------------------------------------------------------

    def _plain(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[Tensor],
        indices: Sequence[Tensor], options: Options,
    ) -> Tensor:  # fmt: skip
        with no_autocast(x):
            dtype = x.dtype if x.is_floating_point() else weight.dtype
            bias = None if bias is None else bias.to(dtype)
            adapted = plain_weight(weight, deltas, indices).to(dtype)
            return self.forward(x, bias, options, adapted)

    def _gradients_with_a_graph(
        self, grad: Tensor, x: Tensor | None, weight: Tensor, deltas: Sequence[Tensor],
        indices: Sequence[Tensor], options: Options, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Return ``dx, dweight, *dvalues``, as `_gradients`, differentiable again."""
        if x is None or (grad.numel() and not x.numel()):
            # not kept, for only its own gradient is needed, which is the same at any x
            x = torch.zeros_like(self.fake_dx(grad, grad, options, weight)).requires_grad_()

        def product(x: Tensor, weight: Tensor, *deltas: Tensor) -> Tensor:
            return self._plain(x, weight, None, deltas, indices, options)

        need_x, need_weight, need_values = needs
        each = need_x, need_weight, *[need_values] * len(deltas)
        return gradients_with_a_graph(product, (x, weight, *deltas), each, grad)

    # --- as a custom op ---------------------------------------------------------------------------

    def __init__(self, name: str, options: str) -> None:
        def compute(x: Any, weight: Any, bias: Any, deltas: Any, indices: Any, *rest: Any) -> Any:
            plan = plan_for(indices, weight.shape, weight.stride())
            return self._compute(x, weight, bias, deltas, plan, rest)

        def compute_gradients(
            grad: Any, x: Any, weight: Any, deltas: Any, indices: Any, *rest: Any
        ) -> Any:
            """Return ``[dx, dweight, dvalues...]``; an op cannot say None: an empty tensor."""
            *rest, needs = rest  # type: ignore[assignment]
            plan = plan_for(indices, weight.shape, weight.stride())
            found = self._gradients(grad, x, weight, deltas, plan, rest, needs)
            return [grad.new_empty(0) if d is None else d for d in found]

        op = torch.library.custom_op(
            f"shira::{name}", compute, mutates_args=(),
            schema=f"({_ARGUMENTS}, {options}) -> Tensor",
        )  # fmt: skip
        gradient_op = torch.library.custom_op(
            f"shira::{name}_backward", compute_gradients, mutates_args=(),
            schema=f"({_GRADIENT_ARGUMENTS}, {options}, bool[] needs) -> Tensor[]",
        )  # fmt: skip
        op.register_fake(self._fake)
        gradient_op.register_fake(self._fake_gradients)
        op.register_autograd(self._backward, setup_context=self._setup)
        self._op = getattr(torch.ops.shira, name)
        self._gradient_op = getattr(torch.ops.shira, f"{name}_backward")

    def _fake(self, x: Tensor, weight: Tensor, b: Any, d: Any, i: Any, *options: Any) -> Tensor:
        with no_autocast(x):
            weight = weight.to(x.dtype) if x.is_floating_point() else weight
            return self.forward(x, None, options, weight)

    def _fake_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, deltas: Any, indices: Any, *rest: Any
    ) -> list[Tensor]:
        *options, (need_x, need_weight, need_values) = rest
        dx = self.fake_dx(grad, x, options, weight) if need_x else grad.new_empty(0)
        dweight = weight.new_empty(weight.shape if need_weight else 0)
        return [dx, dweight, *(d.new_empty(d.shape if need_values else 0) for d in deltas)]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, deltas, indices, *ctx.options = inputs
        keeps_x = self.keeps_x or weight.requires_grad or any(d.requires_grad for d in deltas)
        ctx.save_for_backward(x if keeps_x else x.new_empty(0), weight, *deltas, *indices)

    def _backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        deltas, indices = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        need_x, need_weight, need_bias, need_deltas = ctx.needs_input_grad[:4]
        needs = [need_x, need_weight, any(need_deltas)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = self._gradients_with_a_graph(
                grad, x, weight, deltas, indices, ctx.options, needs
            )
        else:
            found = self._gradient_op(grad, x, weight, deltas, indices, *ctx.options, needs)
        nothing = [None] * len(deltas)
        return (
            found[0] if need_x else None,
            found[1] if need_weight else None,
            self.dbias(grad) if need_bias else None,
            found[2:] if needs[2] else nothing,
            nothing,
            *(None,) * len(ctx.options),
        )


class _Eager(torch.autograd.Function):
    """A product without the op's machinery; deltas and indices stand one by one at the end."""

    @staticmethod
    def forward(
        ctx: Any, product: Product, options: tuple[Any, ...], bias: Tensor | None, x: Tensor,
        weight: Tensor, *rest: Tensor,
    ) -> Tensor:  # fmt: skip
        count = len(rest) // 2
        keeps_x = product.keeps_x or True in ctx.needs_input_grad[4:]
        ctx.save_for_backward(x if keeps_x else None, weight, *rest)
        plan = plan_for(rest[count:], weight.shape, weight.stride())
        ctx.product, ctx.options, ctx.plan = product, options, plan
        return product._compute(x, weight, bias, rest[:count], plan, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        product, plan, count = ctx.product, ctx.plan, len(rest) // 2
        _, _, need_bias, need_x, need_weight, *need_rest = ctx.needs_input_grad
        needs = need_x, need_weight, True in need_rest
        deltas, indices, options = rest[:count], rest[count:], ctx.options
        if torch.is_grad_enabled():  # a graph of this pass is wanted
            make = product._gradients_with_a_graph
            found = make(grad, x, weight, deltas, indices, options, needs)
        else:
            if weight.stride() != plan.stride:  # hooks on saved tensors may lay it out anew
                plan = plan_for(indices, weight.shape, weight.stride())
            found = product._gradients(grad, x, weight, deltas, plan, options, needs)
        dbias = product.dbias(grad) if need_bias else None
        return None, None, dbias, *found, *[None] * count


# The class method of `Function`, without what it does for functorch and for a setup_context.
_apply: Any = super(torch.autograd.Function, _Eager).apply


def runs_eagerly(*tensors: Tensor) -> bool:
    """Return whether torch computes on these op by op: nothing traces, fakes, transforms."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    if forward_ad._current_level >= 0:
        return False
    return all(type(t) in _PLAIN and not t.is_meta for t in tensors)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast leaves dtypes alone: inside an op they are as wanted."""
    return torch.autocast(like.device.type, enabled=False) if _casts(like) else nullcontext()


def _casts(like: Tensor) -> bool:
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
