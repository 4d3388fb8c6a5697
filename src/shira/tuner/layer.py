# SPDX-License-Identifier: Apache-2.0
"""`ShiraLayer`: what the layer types share: adapters, merging with exact undo, the forward's frame.

A layer type says only how its product is computed (`_product`). The base weight is pristine
whenever no product is under way and no adapter is merged; merging keeps the originals and puts
them back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from shira.delta import checked_scale
from shira.errors import AdapterError, MergeError, TargetError
from shira.ops.memory import overlaps_itself, settle, under_way
from shira.ops.resident import Undo, merge_into
from shira.store.names import INDICES, VALUES, full_shape, is_partitioned, is_sharded
from shira.support import Support, matrix_shape
from shira.tuner.adapted_weight import (
    AdaptedWeight,
    Inside,
    LatestReading,
    adapted_weight,
    product_input,
)
from shira.tuner.base_layer import (
    Way,
    call_with_hooks,
    call_with_weights,
    gather_for_call,
    has_hooks_of_users,
    inputs_of,
    is_computed,
    members,
    stored_weight,
    way_to_call,
    weight_of,
    with_originals,
)
from shira.tuner.config import ShiraConfig
from shira.tuner.indices import IndexDict, check_new_models, check_while_compiling, digest_of
from shira.tuner.mixed_batch import BASE, Rows, mixed_batch_forward
from shira.tuner.quantized import (
    Packed,
    Repacked,
    backend_of,
    can_repack,
    can_unpack,
    repack,
)


class Shardable:
    """First among the bases of a layer, it lets FSDP2 give the layer another class.

    ``fully_shard(layer)`` puts a class of its own before the layer's, and Python takes that only
    for objects laid out alike: with ABC first, the base of PEFT's class, they are not.
    """


class ShiraLayer(Shardable, BaseTunerLayer, nn.Module):
    """Base of the adapted layers; a type says how its product is made, and how it is stored.

    Attributes:
        shira_weight: ``{adapter name: (k,) parameter}``, the trained deltas.
        shira_indices: ``{adapter name: int32 (2, k)}``, row and column of each in the weight as
            stored (of more than two dimensions: the first, and all others together). Kept in less
            memory: see `IndexDict`.
        scaling: Factor on each adapter's deltas; 1.0 in training.
        chosen: A hash of the positions that each adapter's configuration led to.
        base_reloaded: Whether a state dict has been loaded into the base weight since.
        weight_name: Of the weight, in the base model; empty if not known.
        parameter_name: Of the weight, in the base layer.
    """

    parameter_name = "weight"
    _key_of_base = "base_layer.weight"
    """Of the base's weight in the layer's state dict."""

    adapter_layer_names = ("shira_weight",)
    other_param_names = ("r", "scaling", "shira_indices", "chosen")
    cast_input_dtype_enabled = True
    """A switch of PEFT's (``disable_input_dtype_casting``). Nothing depends on it, as the input is
    cast only where torch's own layer casts it, under autocast."""
    base_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The base layers that the type adapts."""
    known_forwards: ClassVar[frozenset[Callable[..., Any]]] = frozenset()
    """Forwards of base layers that `_product` stands in for; others are given another weight."""
    requantize = False
    """Let a merge unpack a quantized weight and pack it again, as PEFT's LoRA does."""
    repacked: Repacked | None = None
    """The count of what that has done; None unless merged so."""
    _packed: Packed | None = None  # the base layer of before that, instead of `_undo`
    tied_to: ShiraLayer | None = None
    """The layer that has the adapters of this one: see `shira.tuner.tied`."""
    _beside_shards: Mapping[str, Tensor] = {}
    """Values that came to a weight which FSDP2 had sharded already: see `check_ranks`."""
    whole_product_from: ClassVar[float] = 0
    """Tokens of a group of samples from which a product with the whole weight beats `_on_top`."""

    def __init__(
        self,
        base_layer: nn.Module,
        support: Support,
        adapter_name: str,
        config: ShiraConfig,
        r: int,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._wrap(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._before_scaling: list[tuple[float, dict[str, float]]] = []
        self.chosen: dict[str, str] = {}
        self.shira_weight = nn.ParameterDict({})
        self.shira_indices = IndexDict(self.weight_shape)
        self.merged_adapters: list[str] = []
        self._undo: Undo | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, support, r, config=config)
        for module in (self, self.shira_weight, self.shira_indices):
            module.training = base_layer.training

    def _wrap(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Set what depends on the base layer alone, not on the adapters."""
        self.base_layer = base_layer
        self.quantization_backend = backend_of(self.get_base_layer(), **kwargs)
        self.base_reloaded = False
        self._merge_after_loading: list[str] = []
        self._warned_about_hooks = False
        self._samples: Sequence[str] | None = None
        self._gradient_watch: Any = None  # a GradientWatch, until the first backward pass
        self._reading = LatestReading()
        self.weight_name = ""
        self.weight_shape = full_shape(weight_of(self))
        self.fan_in_fan_out = self._stores_input_first()
        sizes = matrix_shape(self.weight_shape)
        self.in_features, self.out_features = sizes if self.fan_in_fan_out else sizes[::-1]
        self.register_load_state_dict_post_hook(_merge_what_was_merged)

    def _stores_input_first(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        """Return a setting of the base layer (``num_embeddings``, ``stride``) that is not here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_") or name not in base.__dict__:
                raise
            return base.__dict__[name]

    def get_base_layer(self) -> nn.Module:
        """Return the layer that is adapted, under whatever adapts it already."""
        base: Any = self._modules["base_layer"]
        return super().get_base_layer() if "base_layer" in base._modules else base  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- adapters

    def update_layer(
        self,
        adapter_name: str,
        support: Support,
        r: int,
        config: ShiraConfig,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to the layer, or put a new one in its place.

        Args:
            adapter_name: Its name.
            support: Which entries it trains.
            r: The rank it is said to have.
            config: ``init_weights``.
            inference_mode: Leave it frozen.
            **kwargs: What PEFT hands on of the quantization; not needed here.
        """
        self._positions_unchecked = True
        self.r[adapter_name] = r
        self.scaling[adapter_name] = 1.0
        # config.init_weights=False is for tests: deltas that do something before any training
        make = torch.zeros if config.init_weights else torch.randn
        self.shira_weight[adapter_name] = nn.Parameter(make(support.nnz), requires_grad=True)
        self.shira_indices[adapter_name] = support.coordinates()
        self.chosen[adapter_name] = digest_of(support)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        if hasattr(stored_weight(self), "full_tensor"):
            values = {adapter_name: self.shira_weight[adapter_name]}
            self._beside_shards = {**self._beside_shards, **values}

    def reset_shira_parameters(self, adapter_name: str) -> None:
        """Set an adapter's deltas to zero."""
        nn.init.zeros_(self.shira_weight[adapter_name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor on an adapter's deltas, also if it is merged.

        An adapter that is not here is ignored.

        Raises:
            AdapterError: If the factor is not a finite number; nothing has changed.
        """
        if adapter not in self.scaling:
            return
        scale = checked_scale(adapter, scale)
        merged = list(self.merged_adapters)
        if adapter in merged:  # first, so that it has the scale that is noted, at any interrupt
            self.unmerge()
        self.scaling[adapter] = scale
        if adapter in merged:
            self.merge(adapter_names=merged)

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active adapters, as diffusers does for one call of a model.

        Raises:
            AdapterError: If the factor is not a finite number; nothing has changed.
        """
        before = {name: self.scaling[name] for name in self.active_adapters if name in self.scaling}
        after = {
            name: checked_scale(name, factor * checked_scale(name, scale))
            for name, factor in before.items()
        }
        for name, factor in after.items():
            self.set_scale(name, factor)
        self._before_scaling.append((scale, before))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo the latest `scale_layer` by this factor, exactly; without one, set all to 1.

        A factor by which nothing was multiplied divides.

        Raises:
            AdapterError: If that is zero or no finite number; nothing has changed.
        """
        names = [name for name in self.active_adapters if name in self.scaling]
        factors = dict.fromkeys(names, 1.0)
        if scale is None:
            self._before_scaling.clear()
        elif self._before_scaling and self._before_scaling[-1][0] == scale:
            factors = self._before_scaling.pop()[1]
        else:
            if checked_scale(self.weight_name, scale) == 0:
                raise AdapterError(
                    f"{self.weight_name}: a factor of 0 cannot be divided by, and scale_layer(0) "
                    "was not the latest call; set_scale sets what is wanted"
                )
            factors = {name: checked_scale(name, self.scaling[name] / scale) for name in names}
        for name, factor in factors.items():
            self.set_scale(name, factor)

    def support(self, adapter_name: str) -> Support:
        """Return the entries that an adapter trains."""
        return self.shira_indices.support(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return an adapter's delta, scaled: a sparse COO tensor of the weight's matrix shape."""
        indices, shape = self.shira_indices[adapter], matrix_shape(self.weight_shape)
        return torch.sparse_coo_tensor(
            indices, self._delta(adapter), shape, is_coalesced=True, check_invariants=False
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it is merged, the originals come back first."""
        if adapter_name in self.merged_adapters:
            self.merge_only([name for name in self.merged_adapters if name != adapter_name])
        super().delete_adapter(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters; enabled again, they are trainable where they were.

        Args:
            enabled: Whether forwards are to use the active adapters.
        """
        with trainable_as_before(self, self.shira_weight, enabled):
            super().enable_adapters(enabled)

    def _delta(self, adapter: str) -> Tensor:
        return self._scaled(adapter, self.shira_weight[adapter])

    def _scaled(self, adapter: str, values: Tensor) -> Tensor:
        if values.is_meta and has_offloaded_params(self.shira_weight):
            if values.requires_grad and torch.is_grad_enabled():  # the gradient would be lost
                raise TargetError(
                    f"{self.weight_name}: the values of adapter {adapter!r} are offloaded, so they "
                    "cannot be trained; offload the base model first, and add the adapter "
                    "afterwards"
                )
            with align_module_device(self.shira_weight):
                values = self.shira_weight[adapter].detach()
        scale = self.scaling[adapter]
        return values if scale == 1.0 else values * scale

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        base: Any = self.get_base_layer()
        if device is None and has_offloaded_params(base):
            # not to the meta device with the weight: nobody would bring them from there
            work = base._hf_hook.execution_device
            device = torch.device("cpu" if work is None else work)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict, without positions while the values are sharded on ``meta``.

        Accelerate's ``cpu_ram_efficient_loading`` fills such a state dict from rank 0, and knows
        what to do with sharded parameters only. The positions are there on every rank.
        """
        settle(stored_weight(self))
        result = super().state_dict(*args, **kwargs)
        values = self.shira_weight.values()
        if any(value.is_meta and hasattr(value, "full_tensor") for value in values):
            self.shira_indices.leave_out(result, f"{kwargs.get('prefix', '')}shira_indices.")
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast what a merge has overwritten along with the weight."""
        now, first = Packed(self) if self._packed else None, self._packed
        result = super()._apply(fn, recurse)
        if self.tied_to is None and self._undo is not None:
            self._undo = self._undo.moved(fn)
        if now is not None and first is not None:
            now.keep()
            try:
                first.put_back()
                self.base_layer._apply(fn)
                first.keep()
            finally:
                now.put_back()
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # What is loaded belongs to the base and the adapters, not to what a merge made of them: the
        # merged ones are taken out before and put in again when all is loaded.
        self.base_reloaded |= prefix + self._key_of_base in state_dict
        keys = [f"{kind}.{name}" for kind in (VALUES, INDICES) for name in self.merged_adapters]
        if self._packed is not None:
            raise MergeError(
                f"{self.weight_name}: a state dict cannot be loaded while {self.merged_adapters} "
                "are merged into the quantized weight; unmerge first"
            )
        if keys and any(prefix + key in state_dict for key in (self._key_of_base, *keys)):
            with_originals(state_dict, prefix + self._key_of_base, self)
            self._merge_after_loading = list(self.merged_adapters)
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ----------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the base weight, keeping the originals.

        Args:
            safe_merge: Check first that all results are finite.
            adapter_names: Which; default the active ones.

        Raises:
            AdapterError: If ``safe_merge`` finds NaN or infinity; nothing was changed.
            MergeError: See `check_mergeable`.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in adapter_names if name in self.shira_weight]
        if not adapter_names:
            return
        if self._is_offloaded():
            with onload_layer(self):
                return self.merge(safe_merge, adapter_names)
        self.check_mergeable(adapter_names)
        self.check_unmergeable()  # several are merged from the originals
        together = [*self.merged_adapters, *adapter_names]
        if self.quantization_backend is not None:
            self._merge_packed(together, safe_merge)
            return
        weight = weight_of(self)
        before, names = self._undo, self.merged_adapters
        with torch.no_grad():
            merge_into(
                weight,
                [self._delta(name) for name in together],
                [self.shira_indices.kept(name) for name in together],
                before,
                lambda undo: self._note_merged(names if undo is before else together, undo),
                partial(_refuse_not_finite, adapter_names[-1]) if safe_merge else None,
            )

    def _merge_packed(self, together: list[str], safe_merge: bool) -> None:
        """Merge adapters, and no others, into the weight as it was first packed."""
        now, first = Packed(self), self._packed or Packed(self)
        before = self._packed, self.repacked
        try:
            self._packed = first
            first.put_back()
            with torch.no_grad():
                self.repacked = repack(
                    self,
                    self.quantization_backend,
                    [self._delta(name) for name in together],
                    [self.shira_indices.kept(name) for name in together],
                    partial(_refuse_not_finite, together[-1]) if safe_merge else None,
                )
            self.merged_adapters = together
        except BaseException:
            now.put_back()
            self._packed, self.repacked = before
            raise

    def _note_merged(self, names: list[str], undo: Undo | None) -> None:
        # both at once: no interrupt comes between
        self.__dict__.update(merged_adapters=names, _undo=undo)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Check that adapters can be written into the base weight.

        Raises:
            MergeError: If it is packed by quantization (unless to ``requantize``), computed from
                other parameters, its entries share memory, or this process has a part of it only.
        """
        backend = self.quantization_backend
        if backend is not None:
            if self.requantize and can_repack(backend):
                return
            kind = getattr(backend, "backend_name", "") or type(backend).__name__
            why = f"a quantized weight ({kind}): "
            if not self.requantize:
                why += (
                    "packing it again would round many of the deltas away and change the weights "
                    "around them. Load the base model unquantized first, ask for it nevertheless "
                    "(merge_and_unload(requantize=True))"
                )
            elif not can_unpack(backend):
                why += "PEFT cannot unpack it. Load the base model unquantized first"
            else:
                why += (
                    "it was quantized by hand, so how to pack it again is not known. Let "
                    "transformers quantize the model (TorchAoConfig)"
                )
        elif is_computed(self):
            why = (
                "a weight that is computed from other parameters (weight_norm, spectral_norm, "
                "orthogonal, pruning): it would be computed anew without them. Remove the "
                "parametrization first (torch.nn.utils.parametrize.remove_parametrizations, "
                "prune.remove)"
            )
        elif is_sharded(weight := weight_of(self)):
            why = (
                "a weight of which this process has a part only (FSDP2, ZeRO-3). Save the adapter "
                "and merge it into a model in one process"
            )
        elif overlaps_itself(weight):
            why = (
                "a weight whose entries share memory (an expanded tensor), so that writing one "
                "writes others. Clone the weight first"
            )
        else:
            return
        raise MergeError(
            f"{self.weight_name}: adapters {list(adapter_names)} cannot be merged into {why}, or "
            "keep them unmerged"
        )

    def _is_offloaded(self) -> bool:
        """Return whether the weight is elsewhere, where it would not be written to."""
        return weight_of(self).is_meta and has_offloaded_params(self.get_base_layer())

    def check_unmergeable(self) -> None:
        """Check that what a merge has overwritten can be put back.

        Raises:
            MergeError: If another weight has taken the place of the one that was merged into.
        """
        undo, why = self._undo, ""
        if undo is None:
            return
        if is_computed(self):
            why = "is computed from other parameters now; remove the parametrization first"
        elif is_sharded(weight := weight_of(self)):
            why = "has been sharded since (FSDP2, ZeRO-3); unmerge before that"
        elif weight.shape != undo.plan.weight_shape:
            shapes = f"{tuple(undo.plan.weight_shape)}, and is {tuple(weight.shape)} now"
            why = f"was of shape {shapes}; put the weight back that was merged into"
        if why:
            raise MergeError(
                f"{self.weight_name}: adapters {self.merged_adapters} cannot be taken out of the "
                f"weight, which {why}. Nothing was changed"
            )

    def unmerge(self) -> None:
        """Put the originals back, bit for bit; of a weight that was cast, cast as it was.

        Raises:
            MergeError: See `check_unmergeable`.
        """
        if self._packed is not None:
            self._packed.put_back()
            self.__dict__.update(merged_adapters=[], _packed=None, repacked=None)
            return
        if self._undo is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_unmergeable()
        if self._is_offloaded():
            with onload_layer(self):
                return self.unmerge()
        with torch.no_grad():
            weight = weight_of(self)
            self._undo.restore(weight, lambda: self._note_merged([], None))

    def merge_only(self, adapter_names: Sequence[str]) -> None:
        """Have just these adapters merged, from the originals.

        Args:
            adapter_names: Which; none is to unmerge.
        """
        names = list(adapter_names)
        if self.merged_adapters:
            self.unmerge()
        if names:
            self.merge(adapter_names=names)

    # ----------------------------------------------------------------- forward

    @property
    def weight(self) -> Tensor:
        """The base weight with the active adapters inside, as the layer computes with it.

        The base weight itself while no adapter is in effect; ``get_base_layer().weight`` always is.
        """
        base: Any = self._modules["base_layer"]
        weight: Tensor | None = base._parameters.get("weight")
        if weight is None:  # GPTQ's packed weight, a computed one, one that FSDP1 has
            weight = super().weight
        return self._with_adapters(weight)

    def _with_adapters(self, weight: Tensor) -> Tensor:
        """Return the base's weight as read from outside: with the adapters in effect."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()  # as the forward does
        names = self._in_effect()
        # A packed weight (bitsandbytes) is of use to its own library alone; where a weight is
        # offloaded, there is none now; within the base layer's own forward it is adapted already.
        other = weight.is_meta or weight.shape != self.weight_shape
        if not names or other or isinstance(weight, AdaptedWeight):
            return weight
        if self._samples is not None:
            wanted = {name if name in self.shira_weight else BASE for name in self._samples}
            names = [] if len(wanted) > 1 else [*wanted]
            if names == [BASE]:
                return weight
        return self._reading.adapted_weight(weight, *self._parts_in_use(names))

    def _in_effect(self) -> list[str]:
        """Return the active adapters that are here; none while some are merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        values: Any = self._modules["shira_weight"]
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        return [name for name in names if name in values]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base layer with the active adapters inside its weight.

        Args:
            *args: The base layer's.
            **kwargs: The same; ``adapter_names``: one adapter name for each sample of the first
                argument.

        Returns:
            What the base layer returns.
        """
        wanted = kwargs.pop("adapter_names", None) if kwargs else None
        if wanted is None:
            wanted = self._samples
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if wanted is not None and not self._disable_adapters:
            return mixed_batch_forward(self, wanted, args, kwargs)
        names = self._in_effect()
        if not names:
            return self._base_forward(*args, **kwargs)
        return self._adapted_forward(names, args, kwargs)

    def _base_forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and under_way:
            settle(stored_weight(self))
        return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]

    def _adapted_forward(
        self, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        base: Any = self._modules["base_layer"]
        way = self._way(base)
        if way is Way.OWN:

            def weight() -> Tensor:
                return adapted_weight(weight_of(self), *self._parts_in_use(adapter_names))

            if torch.compiler.is_compiling():
                return torch.func.functional_call(base, {"weight": weight()}, args, kwargs)
            self._warn_once_about_module_hooks()
            return call_with_weights(base, {"weight": weight}, *args, **kwargs)
        inputs = args if len(args) == 1 and not kwargs else inputs_of(base, args, kwargs)
        deltas, indices = self._in_use(adapter_names)
        if way is Way.DIRECT:
            return self._product(deltas, indices, *inputs)
        self._warn_once_about_module_hooks()
        return call_with_hooks(base, partial(self._product, deltas, indices), *inputs)

    def _way(self, base: nn.Module) -> Way:
        """Return how to call the base layer: `_product` is for the known forwards."""
        known = self.known_forwards if self.quantization_backend is None else None
        return way_to_call(base, known)

    def _in_use(
        self, adapter_names: Sequence[str], caller: ShiraLayer | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return deltas, scaled, and positions of adapters that are about to be computed with.

        By the layer itself, or by the ``caller``, which is tied to it.
        """
        values: Any = self._modules["shira_weight"]
        positions: Any = self._modules["shira_indices"]
        parameters = members(values, *adapter_names)
        if True in map(is_partitioned, parameters):
            for parameter in parameters:
                gather_for_call(caller or self, parameter)
        scaling, deltas = self.scaling, parameters
        scaled = True in [scaling[name] != 1.0 for name in adapter_names]
        if scaled or True in [parameter.is_meta for parameter in parameters]:
            deltas = [*map(self._scaled, adapter_names, parameters)]
        indices = positions.all_kept(adapter_names)
        trains = True in [parameter.requires_grad for parameter in parameters]
        if torch.compiler.is_compiling():
            check_while_compiling()
        elif trains and torch.is_grad_enabled():
            if self._positions_unchecked:
                check_new_models(self)
            if self._gradient_watch is not None:
                self._gradient_watch.use(self, adapter_names, parameters)
        return deltas, indices

    def _parts_in_use(self, adapter_names: Sequence[str]) -> tuple[list[Tensor], Inside]:
        """Return what `adapted_weight` takes beside the base weight."""
        deltas, indices = self._in_use(adapter_names) if adapter_names else ([], [])
        base, backend = self.get_base_layer(), self.quantization_backend
        return deltas, Inside(self.weight_name, base, backend, indices)

    def _product(self, deltas: list[Tensor], indices: list[Tensor], *inputs: Any) -> Tensor:
        """Compute the layer's product with these deltas in its weight, of its forward's inputs."""
        raise NotImplementedError

    def _cast_input(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the input in autocast's dtype, or in the weight's, which it must have already."""
        if x.dtype == weight.dtype and not torch._C._is_any_autocast_enabled():
            return x
        cast = product_input(x, weight)
        if cast is None and self.quantization_backend is None:
            raise TargetError(
                f"the input is {x.dtype} but the weight is {weight.dtype}; cast one of them, "
                "or use torch.autocast"
            )
        return x if cast is None else cast

    def _on_top(self, adapters: list[str], rows: Rows, x: Tensor, result: Tensor) -> Tensor:
        """Put adapters on top of what the base layer returned, ``(..., out)``, each its rows."""
        raise NotImplementedError

    def _warn_once_about_module_hooks(self) -> None:
        if not self._warned_about_hooks and has_hooks_of_users(self.base_layer):
            self._warned_about_hooks = True
            warnings.warn(
                "One of the base layers adapted with ShiRA has backward/forward (pre) hooks set. "
                "They run, and see the input and output of the adapted product.",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return "shira." + super().__repr__()

    def extra_repr(self) -> str:
        """Describe a quantized base, as PEFT's layers do."""
        return str(quantization_extra_repr(self))


@contextmanager
def trainable_as_before(layer: Any, values: nn.Module, enabled: bool) -> Iterator[None]:
    """Leave values trainable where they were, when the body enables a layer that was disabled."""
    if not enabled and not layer.disable_adapters:
        trained = {name: value.requires_grad for name, value in values.named_parameters()}
        layer._trained_when_disabled = list(layer.active_adapters), trained
    yield
    if enabled:
        active, trained = layer.__dict__.pop("_trained_when_disabled", (None, {}))
        for name, value in values.named_parameters():
            if name in trained and active == list(layer.active_adapters):
                value.requires_grad_(trained[name])


def _merge_what_was_merged(layer: ShiraLayer, _: Any) -> None:
    merged, layer._merge_after_loading = layer._merge_after_loading, []
    if merged:
        layer.merge(adapter_names=merged)


def _refuse_not_finite(adapter_name: str, merged: Tensor) -> None:
    finite = torch.isfinite(merged)
    if not finite.all():
        raise AdapterError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: "
            f"{int((~finite).sum())} of its {merged.numel()} results are not finite. Nothing was "
            "merged"
        )
