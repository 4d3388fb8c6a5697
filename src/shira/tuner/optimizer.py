# SPDX-License-Identifier: Apache-2.0
"""`FactoredAdamW`: AdamW whose second moments are those of rows and columns of the weights.

The gradient of a single entry is noisy. Divided by its own second moment, as in Adam, every entry
moves about as far, also those whose gradient says nothing. Here an entry's second moment is
estimated from those of its row and of its column over the trained entries, as Adafactor does for
whole matrices (arXiv 1804.04235, section 3): what rows and columns differ in is evened out, what
entries of one row and column differ in is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shira.errors import ConfigError, TargetError
from shira.store.names import is_partitioned, is_sharded
from shira.support import matrix_shape
from shira.tuner.base_layer import base_of, pristine, readable
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import Convolution
from shira.tuner.quantized import unpacked
from shira.tuner.saving import layers_of

RELATIVE_STEP = 0.0036
"""The norm of a step over that of the weights, at the default learning rate.

The best rates of the language model's study, at 1.1 and 4.6 % of the entries (docs/study-lm.md)."""
_OTHERS_RATE = 1e-3
_IN_PARTS = (
    "FactoredAdamW needs whole values, and FSDP2 and DeepSpeed keep a part on each process. Train "
    "with torch.optim.AdamW, or under DDP"
)
_SECOND = {"exp_avg_sq", "mean_sq", "row_sq", "column_sq"}


class FactoredAdamW(torch.optim.Optimizer):
    """AdamW for the values of SHiRA adapters, second moments by rows and columns.

    For a weight of m rows and n columns the state is one first moment for each of its k trained
    entries and ``m + n`` second moments, which are float32. Other trainable parameters, such as
    those of ``modules_to_save``, are stepped as by ``torch.optim.AdamW``.

    Args:
        model: A PEFT model. Its trainable parameters are optimized, in a group for each weight.
        lr: The learning rate; if `by_weight`, the mean of the entries' rates. None: that at which a
            step moves the adapted weights by `RELATIVE_STEP` of their norm; 1e-3 for other
            parameters.
        betas: Decay rates of the first and second moments.
        eps: Added to the square root of second moments.
        weight_decay: Decoupled weight decay, which pulls deltas towards zero, the base model.
        by_weight: Give the entries of each weight a rate in proportion to the weight's standard
            deviation; it is read once, now. Schedulers scale the rates of all groups.

    Raises:
        ConfigError: If the model trains nothing, or a number is out of range; in `step`, if the
            values are in parts (FSDP2, DeepSpeed).
        TargetError: If the values of a weight cannot be read, for `by_weight` or the default rate.

    Example:
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, ShiraConfig(r=1, target_modules=["0"]))
        >>> optimizer = FactoredAdamW(model)
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        by_weight: bool = True,
    ) -> None:
        numbers = {
            "lr": _OTHERS_RATE if lr is None else lr,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        for name, value, top in (
            *((name, value, math.inf) for name, value in numbers.items()),
            *((f"betas[{i}]", beta, 1) for i, beta in enumerate(betas)),
        ):
            if not 0 <= value < top:
                raise ConfigError(f"{name} must be at least 0 and below {top}, not {value}")
        self._places: dict[Tensor, _Places] = {}
        layers: dict[Tensor, ShiraLayer] = {}
        for layer in layers_of(model).values():
            for adapter, values in layer.shira_weight.items():
                if not values.requires_grad:
                    continue
                if is_partitioned(values) or is_sharded(values):
                    raise ConfigError(f"{layer.weight_name}, adapter {adapter!r}: {_IN_PARTS}")
                self._places[values] = _Places.of(layer, adapter)
                layers[values] = layer
        groups: list[dict[str, Any]] = [
            {"params": [values], "lr": rate, "factored": True}
            for values, rate in _rates(layers, lr, by_weight).items()
        ]
        others = [p for p in model.parameters() if p.requires_grad and p not in layers]
        if others:
            groups.append({"params": others})
        if not groups:
            raise ConfigError("the model has no trainable parameters: is its adapter active?")
        super().__init__(groups, {"betas": betas, "factored": False} | numbers)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a step; return the loss of the closure, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["factored"] and parameter not in self._places:
                    raise ConfigError(
                        "the values of an adapter are others than when the optimizer was made: "
                        f"{_IN_PARTS}"
                    )
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as ``torch.optim.Optimizer`` does, second moments in float32."""
        super().load_state_dict(state_dict)
        saved = [
            state_dict["state"].get(i) for g in state_dict["param_groups"] for i in g["params"]
        ]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, kept in zip(parameters, saved, strict=True):
            for name in _SECOND.intersection(kept or ()):  # torch casts to the parameter's dtype
                self.state[parameter][name] = kept[name].to(parameter.device, copy=True)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        one, two = group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        first = state["exp_avg"].lerp_(gradient, 1 - one)
        root = self._second(parameter, gradient.float().square(), state, two).sqrt_()
        root.div_((1 - two ** state["step"]).sqrt_()).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(
            root.reciprocal_().mul_(first).mul_(group["lr"] / (1 - one ** state["step"]))
        )

    def _second(
        self, parameter: Tensor, square: Tensor, state: dict[str, Any], two: float
    ) -> Tensor:
        """Take in squared gradients; return the second moments of the entries, a new tensor."""
        places = self._places.get(parameter)
        if places is None:
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(square)
            second: Tensor = state["exp_avg_sq"].lerp_(square, 1 - two)
            return second.clone()
        if places.at.device != parameter.device:
            places = self._places[parameter] = places.to(parameter.device)
        if "mean_sq" not in state:
            state["mean_sq"] = square.new_zeros(())
            state["row_sq"], state["column_sq"] = map(torch.zeros_like, places.counts)
        mean = state["mean_sq"].lerp_(square.mean(), 1 - two)
        second = torch.ones_like(square)
        for name, at, count in zip(("row_sq", "column_sq"), *places, strict=True):
            sums = torch.zeros_like(count).index_add_(0, at, square)
            state[name].lerp_(sums.div_(count), 1 - two)
            second.mul_(state[name].index_select(0, at))
            if name == "row_sq":  # before the product: of small gradients that would be zero
                second.div_(mean.clamp(min=torch.finfo(mean.dtype).tiny))
        return second


class _Places(NamedTuple):
    """The rows and columns of the trained entries of a weight."""

    at: Tensor
    """``(2, k)``, int32."""
    counts: tuple[Tensor, ...]
    """The number of entries in each row, and in each column; at least 1."""

    @classmethod
    def of(cls, layer: ShiraLayer, adapter: str) -> _Places:
        """Take a convolution's weight for ``[out, in * kernel]``, a stack of matrices for one."""
        support, shape = layer.support(adapter), layer.weight_shape
        columns = matrix_shape(shape)[1] if isinstance(layer, Convolution) else shape[-1]
        at = torch.stack([support.indices // columns, support.indices % columns]).int()
        return cls(at, tuple(torch.bincount(of).clamp_(min=1).float() for of in at))

    def to(self, device: torch.device) -> _Places:
        return _Places(self.at.to(device), tuple(count.to(device) for count in self.counts))


def _rates(
    layers: Mapping[Tensor, ShiraLayer], lr: float | None, by_weight: bool
) -> dict[Tensor, float]:
    """Return the learning rate of each adapter's values in a layer."""
    if not layers or (lr is not None and not by_weight):
        return dict.fromkeys(layers, _OTHERS_RATE if lr is None else lr)
    of_layer = {layer: _deviation(layer) for layer in {*layers.values()}}
    entries = sum(map(Tensor.numel, layers))
    sizes = (values.numel() * of_layer[layer] for values, layer in layers.items())
    mean = sum(sizes) / max(1, entries)
    # a weight that is all zeros is taken for one of the mean deviation
    factors = {
        values: (of_layer[layer] or mean) / mean if by_weight and mean else 1.0
        for values, layer in layers.items()
    }
    if lr is None:
        norm = math.hypot(
            *(d * math.prod(layer.weight_shape) ** 0.5 for layer, d in of_layer.items())
        )
        step = math.hypot(*(values.numel() ** 0.5 * factor for values, factor in factors.items()))
        lr = RELATIVE_STEP * norm / step if norm and step else _OTHERS_RATE
    return {values: lr * factor for values, factor in factors.items()}


def _deviation(layer: ShiraLayer) -> float:
    """Return the standard deviation of the base's weight."""
    base = pristine(layer)
    with readable(base_of(base)):
        weight = unpacked(base)
        if weight is None:
            raise TargetError(
                f"{layer.weight_name}: rates go by the weight's values, but they are quantized in "
                "a way that cannot be unpacked; pass lr=... and by_weight=False"
            )
        # without a copy in float32
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
        mean = float(weight.mean(dtype=torch.float32))
        return math.sqrt(max(0.0, norm**2 / max(1, weight.numel()) - mean**2))
