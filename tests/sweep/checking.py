# SPDX-License-Identifier: Apache-2.0
"""One model: does an adapter on it do, in every mode, what the merged model does?

The reference is a copy of the model into whose weights the same deltas were added by plain
indexing, with nothing of the library.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shira import ShiraConfig, ShiraError, ShiraLayer, get_peft_model

DENSITY = 0.3
CLOSE = 2e-5
"""Largest difference, as a share of the largest output, that counts as rounding."""


class Finding(NamedTuple):
    """The result for one model and one choice of targets."""

    verdict: str
    """``right``, ``refused``, ``not built`` or ``WRONG``."""
    layers: int = 0
    detail: str = ""


class Wrong(Exception):
    """The adapter does not do what the merged model does."""


Run = Callable[[nn.Module], Any]


def steady(model: nn.Module, lively: bool = True) -> nn.Module:
    """Freeze, set all dropout to zero, and give weights values that outputs depend on.

    Args:
        model: Changed in place.
        lively: Give each linear layer and convolution weights that keep the size of its input, so
            that no layer's part in the output is lost in rounding.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        weight = module._parameters.get("weight")
        if lively and weight is not None and isinstance(module, LAYERS):
            fan = weight.shape[0] if isinstance(module, Conv1D) else math.prod(weight.shape[1:])
            _draw(weight, fan**-0.5, generator)
    for parameter in model.parameters():
        # As PEFT leaves it: torch sums in another order where a weight takes part in training.
        parameter.requires_grad_(False)
        data = parameter.data
        if not data.is_floating_point() or not data.numel():
            continue
        usual = bool(torch.isfinite(data).all()) and data.abs().max() < 1e4
        if usual and not (data.flatten()[0] == data).all():
            continue
        if usual and data.ndim < 2 and data.flatten()[0].abs() > 0.01:
            continue
        _draw(parameter, math.prod(data.shape[1:]) ** -0.5 if data.ndim > 1 else 0.1, generator)
    return model.eval()


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def _draw(parameter: Tensor, spread: float, generator: torch.Generator) -> None:
    values = torch.randn(parameter.shape, generator=generator) * spread
    parameter.data = values.to(parameter.dtype)


class Reference:
    """A model and what it computes without an adapter.

    Args:
        model: In eval mode, steady.
        run: Calls a model and returns its outputs.
    """

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model = model
        self.run = run
        start = copy.deepcopy(model.state_dict())
        self.outputs = {mode: outputs(model, run, mode) for mode in (NO_GRAD, TRAIN)}
        self.why = ""
        """Nothing can be compared on this model, and why."""
        for mode, first in self.outputs.items():
            second = outputs(model, run, mode)
            finite = all(bool(torch.isfinite(one).all()) for one in first)
            if len(first) != len(second) or not all(map(torch.equal, first, second)):
                self.why = f"outputs {'change from run to run' if finite else 'are not finite'}"
            elif not any(bool(torch.isfinite(one).any()) for one in first):
                self.why = "outputs are not finite"
        self.moving = {
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor.nan_to_num(), start[name].nan_to_num())
        }
        """Names of the buffers that the model itself changes."""


def check(model: nn.Module, before: Reference, targets: Any) -> Finding:
    """Check an adapter on these targets of a model.

    Args:
        model: A copy of that of the reference, which may be used up.
        before: The model without an adapter.
        targets: What ``target_modules`` is.
    """
    originals = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name not in before.moving
    }
    merged = copy.deepcopy(model)
    config = ShiraConfig(density=DENSITY, target_modules=targets, random_seed=0)
    try:
        with _noted() as notes:
            adapted = get_peft_model(model, config)
    except ShiraError as error:
        _require_originals(model, originals, "after the refusal")
        return Finding("refused", 0, f"{type(error).__name__}: {error}")
    except Exception as error:
        return Finding("WRONG", 0, f"get_peft_model raises {type(error).__name__}: {error}")
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapted.named_modules()
        if isinstance(layer, ShiraLayer)
    }
    try:
        notes += _check(adapted, layers, before, merged, originals)
    except Wrong as wrong:
        return Finding("WRONG", len(layers), str(wrong))
    except ShiraError as error:
        return Finding("refused", len(layers), f"in use: {type(error).__name__}: {error}")
    except Exception as error:
        return Finding("WRONG", len(layers), f"raises {type(error).__name__}: {error}")
    return Finding("right", len(layers), "; ".join(notes))


def _check(
    adapted: Any,
    layers: dict[str, Any],
    reference: Reference,
    merged: nn.Module,
    originals: dict[str, Tensor],
) -> list[str]:
    notes: list[str] = []
    run, before = reference.run, reference.outputs
    for mode, wanted in before.items():
        _compare(outputs(adapted, run, mode), wanted, f"untrained, {mode}", notes)
    _require_originals(_inner(adapted), originals, "after the first forwards")
    after = _fill(layers, merged, run)
    for mode in (NO_GRAD, EVAL):
        _compare(outputs(adapted, run, mode), after, f"filled, {mode}", notes)
    if all(torch.equal(a, b) for a, b in zip(after, before[NO_GRAD], strict=True)):
        notes.append("no target takes part in the output")
    notes += _train(adapted, layers, merged, run)
    _require_originals(_inner(adapted), originals, "after a backward")
    try:
        adapted.eval().merge_adapter()
    except ShiraError as error:
        notes.append(f"merge refused: {error}")
    else:
        _compare(outputs(adapted, run, NO_GRAD), after, "merged", notes)
        adapted.unmerge_adapter()
        _require_originals(_inner(adapted), originals, "after unmerge")
    restored = adapted.unload()
    _require_originals(restored, originals, "after unload")
    if _modules(restored) != _modules(reference.model):
        raise Wrong("after unload: other modules than before")
    return notes


def _modules(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# ------------------------------------------------------------------------------ outputs

NO_GRAD, EVAL, TRAIN = "eval without gradients", "eval", "train"


def outputs(model: nn.Module, run: Run, mode: str) -> list[Tensor]:
    """Return the floating outputs of a model in a mode, with norms always as in eval."""
    return [tensor.detach() for tensor in _forward(model, run, mode)]


def _forward(model: nn.Module, run: Run, mode: str) -> list[Tensor]:
    model.train(mode == TRAIN)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.eval()
    torch.default_generator.manual_seed(0)
    with torch.set_grad_enabled(mode != NO_GRAD):
        return list(_tensors(run(model)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_complex():
            value = torch.view_as_real(value)
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif hasattr(value, "sample") and isinstance(value.sample, Tensor):
        yield from _tensors(value.sample)
    elif hasattr(value, "mean") and isinstance(value.mean, Tensor):  # a distribution
        yield from _tensors(value.mean)


def _compare(got: list[Tensor], wanted: list[Tensor], when: str, notes: list[str]) -> None:
    if [g.shape for g in got] != [w.shape for w in wanted]:
        raise Wrong(f"{when}: other shapes of outputs")
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        if torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num()):
            continue
        finite = torch.isfinite(other)
        if not torch.equal(finite, torch.isfinite(one)):
            raise Wrong(f"{when}: not finite elsewhere")
        scale = other[finite].abs().max().clamp_min(1e-30)
        worst = max(worst, float((one[finite] - other[finite]).abs().max() / scale))
    if worst > CLOSE:
        raise Wrong(f"{when}: off by {worst:.1e} of the largest output")
    if worst:
        notes.append(f"{when}: rounding, {worst:.0e}")


# ------------------------------------------------------------------------------ the reference


def _fill(layers: dict[str, Any], merged: nn.Module, run: Run) -> list[Tensor]:
    """Give all adapters values, add them to the reference; its outputs.

    The values are made smaller until the outputs are finite.
    """
    weights = {name: _plain_weight(*_place(merged, name, one)) for name, one in layers.items()}
    clean = {name: weight.detach().clone() for name, weight in weights.items()}
    for factor in (0.5, 0.1, 0.01):
        for name, layer in layers.items():
            weight, indices = weights[name], layer.support("default").indices
            parameter = layer.shira_weight["default"]
            wave = torch.cos(torch.arange(len(parameter)) * 1.3)
            spread = clean[name].float().std() if clean[name].numel() > 1 else torch.tensor(0.1)
            values = (wave * factor * spread.clamp_min(1e-3)).to(parameter.dtype)
            with torch.no_grad():
                parameter.copy_(values)
                weight.copy_(clean[name])
                flat = weight.view(-1)
                flat[indices] = (flat[indices].to(values.dtype) + values).to(flat.dtype)
        result = outputs(merged, run, NO_GRAD)
        if all(bool(torch.isfinite(one).all()) for one in result):
            break
    return result


def _place(model: nn.Module, name: str, layer: Any) -> tuple[nn.Module, str]:
    """The module without an adapter, and the name of the parameter that a layer adapts."""
    path = re.sub(r"(\.base_layer)+$", "", name)
    return model.get_submodule(path), getattr(layer, "parameter_name", "weight")


def _plain_weight(module: nn.Module, parameter: str) -> Tensor:
    """A weight of the module's own, not computed of others and not tied."""
    from torch.nn.utils import parametrize

    if parameter != "weight":
        made = nn.Parameter(getattr(module, parameter).detach().clone(), requires_grad=False)
        setattr(module, parameter, made)
        return made
    if parametrize.is_parametrized(module, "weight"):
        kind = type(module)  # torch takes the weight out of the class, which copies share
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    elif hasattr(module, "weight_g"):
        nn.utils.remove_weight_norm(module)
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    return module.weight


# ------------------------------------------------------------------------------ gradients


def _train(adapted: Any, layers: dict[str, Any], merged: nn.Module, run: Run) -> Iterator[str]:
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    weights = {name: getattr(*_place(merged, name, one)) for name, one in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(weight.is_floating_point())
    notes: list[str] = []
    wanted_outputs, wanted_any = _backward(merged, run)
    got_outputs, got_any = _backward(adapted, run)
    _compare(got_outputs, wanted_outputs, "filled, train", notes)
    if got_any != wanted_any:
        raise Wrong("no output depends on an adapter, though the base's weights get gradients")
    if not got_any:
        return [*notes, "no output can be differentiated"]
    grads = {name: _at_entries(weights[name].grad, layer) for name, layer in layers.items()}
    largest = max((float(one.norm()) for one in grads.values() if one is not None), default=0.0)
    unused, missing, different = [], [], []
    for name, layer in layers.items():
        got, wanted = layer.shira_weight["default"].grad, grads[name]
        if wanted is None or not wanted.any() or not torch.isfinite(wanted).all():
            unused.append(name)
            if got is not None and torch.isfinite(got).all() and got.any():
                different.append(f"{name}, where the base has none")
        elif got is None or not got.any():
            missing.append(name)
        else:
            # Where almost all of a gradient cancels, what is left is rounding: PvtV2's are off by
            # 2.5e-3 in float32, and equal in float64.
            off = float((got - wanted).norm()) / max(float(wanted.norm()), 1e-4 * largest)
            if not off < 5e-3:
                different.append(f"{name} off by {off:.1e}")
    if missing:
        raise Wrong(f"no gradient for {_few(missing)}")
    if different:
        raise Wrong(f"wrong gradient: {_few(different)}")
    if unused:
        notes.append(
            f"no gradient, in the base neither: {len(unused)} of {len(layers)}, {_few(unused)}"
        )
    return notes


def _at_entries(gradient: Tensor | None, layer: Any) -> Tensor | None:
    if gradient is None:
        return None
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.reshape(-1)[layer.support("default").indices].double()


def _backward(model: nn.Module, run: Run) -> tuple[list[Tensor], bool]:
    """Run backward from all outputs; return the outputs, and whether backward was possible."""
    model.zero_grad()
    result = _forward(model, run, TRAIN)
    losses = []
    for one in result:
        if one.requires_grad:
            finite = torch.where(torch.isfinite(one), one, 0)
            wave = torch.cos(torch.arange(one.numel()) * 0.7).reshape(one.shape)
            losses.append((finite.float() * wave).sum())
    if losses:
        torch.stack(losses).sum().backward()
    return [one.detach() for one in result], bool(losses)


# ------------------------------------------------------------------------------ small things


def _require_originals(model: nn.Module, originals: dict[str, Tensor], when: str) -> None:
    """Raise Wrong if a tensor of the base is not what it was, bit for bit."""
    now = {_base_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in originals.items():
        if name not in now:
            raise Wrong(f"{when}: {name} is gone")
        if not torch.equal(now[name].nan_to_num(), tensor.nan_to_num()):
            raise Wrong(f"{when}: {name} has changed")


def _base_name(name: str) -> str:
    return re.sub(r"(\.base_layer)+\.", ".", name)


def _inner(adapted: Any) -> nn.Module:
    return adapted.base_model.model


def _few(names: Any, most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _noted:
    """Collect warnings as notes."""

    def __enter__(self) -> list[str]:
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        self.notes: list[str] = []
        return self.notes

    def __exit__(self, *error: object) -> None:
        self._catch.__exit__(*error)
        self.notes += dict.fromkeys(
            f"warns: {str(one.message)[:200]}" for one in self._caught if "shira" in one.filename
        )
