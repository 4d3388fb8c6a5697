# SPDX-License-Identifier: Apache-2.0
"""`ParameterLayer`: SHiRA in one parameter of a module, by name (``target_parameters``).

Such as the experts of a mixture, ``[experts, out, in]``, which are no layers of their own. The
module's own forward runs, and finds an `AdaptedWeight` in the parameter's place. As in PEFT's LoRA,
the wrapper stands in the module's place, and for several parameters of one module wrappers stand
around wrappers; the outermost one's forward speaks for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shira.errors import AdapterError
from shira.ops.memory import settle, under_way
from shira.support import Support, matrix_shape
from shira.tuner.adapted_weight import adapted_weight, add_grouped_product
from shira.tuner.base_layer import Way, call_with_weights, stored_weight, weight_of
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer
from shira.tuner.mixed_batch import BASE


class ParameterLayer(ShiraLayer):
    """SHiRA in a parameter of a module; called as the module is.

    Attributes:
        parameter_name: Of the parameter in the module.
        num_experts: Matrices in it, if it has three dimensions, else 1.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        support: Support,
        adapter_name: str,
        config: ShiraConfig,
        r: int,
        *,
        parameter_name: str,
        **kwargs: Any,
    ) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, support, adapter_name, config, r, **kwargs)
        self.quantization_backend = None  # such a parameter is refused
        # transformers' own for what torch's grouped_mm does not take; there once its models are
        if fallback := getattr(torch.ops.transformers, "grouped_mm_fallback", None):
            add_grouped_product(fallback)
        shape = self.weight_shape
        self.num_experts = shape[0] if len(shape) == 3 else 1
        sizes = matrix_shape(shape[1:] if len(shape) == 3 else shape)
        stored_input_first = len(shape) == 3 and bool(getattr(self, "is_transposed", False))
        self.in_features, self.out_features = sizes if stored_input_first else sizes[::-1]

    @property
    def _key_of_base(self) -> str:  # type: ignore[override]
        depth = len(self._chain())
        return f"{'base_layer.' * depth}{self.parameter_name}"

    def _chain(self) -> list[ParameterLayer]:
        """Return the wrappers from this one inwards."""
        chain: list[ParameterLayer] = [self]
        while isinstance(inner := chain[-1]._modules["base_layer"], ParameterLayer):
            chain.append(inner)
        return chain

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        weight = weight_of(self)
        return weight.device, weight.dtype

    def __getattr__(self, name: str) -> Any:
        """Return what the module has under a name; a parameter that is adapted with its adapters.

        So that code which computes with it from outside does as the module's own forward.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            # of an attention, asked by the transformer layer around it
            hidden = name.startswith("_") and name != "_qkv_same_embed_dim"
            if "base_layer" not in self.__dict__.get("_modules", {}) or hidden:
                raise
        for wrapper in self._chain():
            if wrapper.parameter_name == name:
                return wrapper._with_adapters(weight_of(wrapper))
        return getattr(self.get_base_layer(), name)

    @property
    def weight(self) -> Tensor:
        """The module's ``weight``, if it has one; adapted, if it is what is adapted."""
        for wrapper in self._chain():
            if wrapper.parameter_name == "weight":
                return wrapper._with_adapters(weight_of(wrapper))
        return getattr(self.get_base_layer(), "weight")  # type: ignore[no-any-return]  # noqa: B009

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the active adapters inside its parameters.

        Args:
            *args: The module's.
            **kwargs: The same; ``adapter_names``: the same one for all samples.

        Returns:
            What the module returns.
        """
        wanted = kwargs.pop("adapter_names", None) if kwargs else None
        if wanted is None:
            wanted = self._samples
        weights: dict[str, Callable[[], Tensor]] = {}
        for wrapper in self._chain():
            if wrapper._disable_adapters and wrapper.merged_adapters:
                wrapper.unmerge()
            names = wrapper._in_effect() if wanted is None else wrapper._the_one_of(wanted)
            if names:
                weights[wrapper.parameter_name] = partial(wrapper._adapted, names)
        return self._call(weights, args, kwargs)

    def _call(
        self, weights: dict[str, Callable[[], Tensor]], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        base: Any = self._chain()[-1]._modules["base_layer"]
        if torch.compiler.is_compiling():
            if not weights:
                return base(*args, **kwargs)
            made = {name: weight() for name, weight in weights.items()}
            return torch.func.functional_call(base, made, args, kwargs)
        for wrapper in self._chain() if under_way else ():
            settle(stored_weight(wrapper))
        if not weights:
            return base(*args, **kwargs)
        self._chain()[-1]._warn_once_about_module_hooks()
        return call_with_weights(base, weights, *args, **kwargs)

    def _adapted(self, adapter_names: Sequence[str]) -> Tensor:
        return adapted_weight(weight_of(self), *self._parts_in_use(adapter_names))

    def _the_one_of(self, adapter_names: Sequence[str]) -> list[str]:
        """Return the one adapter of all samples, none for the base."""
        if self._disable_adapters:
            return []
        wanted = {name if name in self.shira_weight else BASE for name in adapter_names}
        if len(wanted) > 1:
            raise AdapterError(
                f"{self.weight_name}: a parameter of a module (target_parameters) is one for the "
                "whole batch, and a mixture's experts see tokens of all samples, so "
                "`adapter_names` must be all the same"
            )
        return [name for name in wanted if name != BASE]

    def _way(self, base: nn.Module) -> Way:
        return Way.OWN

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without the wrappers, as PEFT asks for it.

        Args:
            merge: Merge the adapters into its parameters first.
            safe_merge: See `merge`.
            adapter_names: Which; default the active ones.
        """
        layers: list[ShiraLayer] = [*self._chain()]
        module = self.get_base_layer()
        parts = [(n, m) for n, m in module.named_modules() if isinstance(m, ShiraLayer)]
        for layer in [*layers, *(part for _, part in parts)] if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for path, part in parts:  # PEFT looks for them where they were
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, part.get_base_layer())
        return module

    def extra_repr(self) -> str:
        """Name the parameter."""
        return f"parameter_name={self.parameter_name!r}"


def wrapper_of(module: nn.Module, parameter_name: str) -> ParameterLayer | None:
    """Return the wrapper around a module that adapts a parameter of it, if there is one."""
    for wrapper in module._chain() if isinstance(module, ParameterLayer) else ():
        if wrapper.parameter_name == parameter_name:
            return wrapper
    return None
