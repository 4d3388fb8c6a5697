# SPDX-License-Identifier: Apache-2.0
"""`ShiraModel`: PEFT's tuner for SHiRA, which puts adapted layers in the place of the targets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    get_quantization_kwargs,
)
from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES
from peft.utils.integrations import init_empty_weights
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from shira.base import fingerprint_fields
from shira.errors import AdapterError, ConfigError, UnknownAdapterError, did_you_mean
from shira.ops.memory import MemoryMap, make_private
from shira.store.names import full_shape, name_of_layer, without_wrappers
from shira.support import Support
from shira.tuner.base_layer import (
    Layer,
    ParameterOf,
    at_rest,
    base_of,
    base_values,
    readable,
    weight_of,
)
from shira.tuner.config import ShiraConfig, as_ours
from shira.tuner.gradient_watch import GradientWatch
from shira.tuner.indices import ignore_in_ddp, ignored_by_ddp, new_models
from shira.tuner.layer import ShiraLayer, trainable_as_before
from shira.tuner.layers import layer_class_of
from shira.tuner.loading import check_state_dict, named_for_loading, read_incoming
from shira.tuner.masking import support_of_layer
from shira.tuner.matching import Matched, Target, matched_parameters, owners_of
from shira.tuner.mixed_batch import BASE, Samples, adapter_names_in_effect
from shira.tuner.parameter import ParameterLayer, wrapper_of
from shira.tuner.quantized import backend_of
from shira.tuner.rollback import as_it_was, merges_of
from shira.tuner.saving import (
    describe,
    fused_adapter,
    in_few_bytes,
    is_elsewhere,
    keys_in_file,
    layers_of,
    watch,
    whole_state,
)
from shira.tuner.targets import check_target, checked_targets, refuse_merging_shared_weights
from shira.tuner.tied import tied_layer
from shira.tuner.token_rows import support_of_rows

REFERENCE = "ref"
"""The name under which TRL's trainers add the reference adapter."""


class ShiraModel(BaseTuner):
    """A model with Sparse High Rank Adapters; made by ``get_peft_model(model, ShiraConfig(...))``.

    Args:
        model: The model to adapt. Its weights keep their bits and their place in memory.
        peft_config: The configuration, or ``{adapter name: configuration}``.
        adapter_name: Name of the first adapter.

    Raises:
        TargetError: If no module is matched, or a matched one cannot be adapted.
        MaskError: If a mask does not fit.
        FileFormatError, WrongBaseError: If a file is being loaded and does not fit; the model is
            then as it was.
    """

    prefix: str = "shira_"
    tuner_layer_cls = ShiraLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        adapted = "peft_config" in model.__dict__
        try:
            with as_it_was(model):
                super().__init__(model, *args, **kwargs)
        except BaseException:
            if not adapted:
                model.__dict__.pop("_hf_peft_config_loaded", None)  # transformers sets it before
            raise
        self.training = model.training
        self._repacks = False  # the last merge was to pack quantized weights again
        self._latest_samples: tuple[Samples, ...] = ()

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Check everything that can be checked, then let PEFT put the layers in."""
        config = self.peft_config[adapter_name] = as_ours(self.peft_config[adapter_name])
        self._memory_map: MemoryMap | None = MemoryMap()
        self._chosen: dict[str, Support] = {}  # by the parameter's name
        self._matched = Matched({})
        tokens, parameters = config.trainable_token_indices, config.target_parameters
        hidden: Any = None
        try:
            self._prepare_adapter_config(config, self.get_model_config(model))
            if config.target_modules != DUMMY_TARGET_MODULES:
                by_name = kwargs.get("state_dict") is None
                # A further adapter that trains whole modules alone is for PEFT to judge.
                some = not (config.modules_to_save and self.targeted_module_names)
                self._matched = checked_targets(config, model, some=by_name and some)
                incoming = read_incoming(config, model)
                if by_name:
                    self._chosen = {
                        target.name: choose_entries(config, target, incoming, self._matched)
                        for target in self._matched.targets
                    }
            config.trainable_token_indices = None  # PEFT has a layer of its own for them
            parameters = config.target_parameters  # with those of "all-linear"
            if self._matched.parameters:  # those of an attention, too, which is a module's name
                config.target_parameters = [target.name for target in self._matched.parameters]
            if self._all_inside_wrappers(model):  # PEFT passes over them, and would find nothing
                hidden, config.target_modules = config.target_modules, DUMMY_TARGET_MODULES
            with as_it_was(self), at_rest(model.modules()), warnings.catch_warnings():
                if config.target_parameters or hidden:  # PEFT looks for matches in modules alone
                    warnings.filterwarnings("ignore", "The following rank_pattern keys did not")
                if self._matched.modules or self._matched.in_parts:  # it does not see all of them
                    warnings.filterwarnings("ignore", "target_modules=.*no module was matched")
                    warnings.filterwarnings("ignore", "You have passed exclude_modules=.*but no")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._adapt_inside_wrappers(config, model, adapter_name)
                self._tie(model)
            config._just_read = config._just_read or config._where
            config._source = config._where = None
            new_models.add(model)
            GradientWatch(model)
            ignore_in_ddp(model)
        finally:
            config.trainable_token_indices, config.target_parameters = tokens, parameters
            config.target_modules = config.target_modules if hidden is None else hidden
            self._memory_map, self._chosen, self._matched = None, {}, Matched({})

    def _all_inside_wrappers(self, model: nn.Module) -> bool:
        """Return whether all that is matched is in modules that an earlier adapter has wrapped."""
        matched = self._matched
        if matched.parameters or not all("base_layer" in path for path in matched.modules):
            return False
        inside = tuple(f"{p}." for p, m in model.named_modules() if isinstance(m, ParameterLayer))
        found = matched.modules
        return bool(found) and all(path.startswith(inside) for path in found)

    def _adapt_inside_wrappers(
        self, config: ShiraConfig, model: nn.Module, adapter_name: str
    ) -> None:
        """Adapt the parts of modules that an earlier adapter has wrapped; PEFT passes them over."""
        for path in self._matched.modules:
            layer = model.get_submodule(path)
            if not isinstance(layer, ShiraLayer) or adapter_name not in layer.shira_weight:
                parent, target, child_name = _get_submodules(model, path)
                self._create_and_replace(config, adapter_name, target, child_name, parent, path)
                self.targeted_module_names.append(path)

    def _tie(self, model: nn.Module) -> None:
        """Have the modules that share the weight of an adapted layer compute with its adapters."""
        for name, owner in self._matched.tied.items():
            module, layer = model.get_submodule(name), model.get_submodule(owner)
            if isinstance(layer, ShiraLayer) and not isinstance(module, ShiraLayer):
                tied = tied_layer(module, layer)
                tied.weight_name = name_of_layer(name, tied)
                parent, _, child = name.rpartition(".")
                self._replace_module(model.get_submodule(parent), child, tied, module)
                self.targeted_module_names.append(name)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._matched.modules:
            return True
        if key in self._matched.in_parts:
            return False
        return key not in self._matched.tied and super()._check_target_module_exists(
            peft_config, key
        )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **optional_kwargs: Any,
    ) -> None:
        config = as_ours(peft_config)
        layer: Any = target
        if parameter_name is not None:
            layer = wrapper_of(target, parameter_name) or ParameterOf(target, parameter_name)
        at = Target(current_key, layer)
        name, r = at.name, config.rank_of(at.name)
        # The mixed model, and an injection by state dict, come here without a choice made before.
        support = getattr(self, "_chosen", {}).get(name)
        if support is None:
            if not isinstance(self, ShiraModel) and config.ties_or_tokens:
                raise ConfigError(
                    "a PeftMixedModel has neither ensure_weight_tying nor trainable_token_indices "
                    "of SHiRA's; use get_peft_model"
                )
            support = choose_entries(config, at)
        layer_class: Any = layer_class_of(base_of(target))
        kwargs = {**get_quantization_kwargs(self), **optional_kwargs}
        if parameter_name is not None:
            layer_class, kwargs["parameter_name"] = ParameterLayer, parameter_name
        # PEFT moves what is new to where the weight is: not to the meta device, if it is offloaded
        with readable(base_of(target)):
            if isinstance(layer, ShiraLayer):
                layer.update_layer(adapter_name, support, r, config=config, **kwargs)
                if adapter_name == REFERENCE:
                    self._copy_adapter_of_same_config(layer, config)
            else:
                packed = backend_of(base_of(target)) is not None  # such is never written to
                if not packed and isinstance(weight := weight_of(layer), nn.Parameter):
                    make_private(weight, getattr(self, "_memory_map", None), warn=False)
                new_module = layer_class(target, support, adapter_name, config, r, **kwargs)
                if adapter_name not in self.active_adapters:
                    new_module.requires_grad_(False)
                new_module.weight_name = name
                self._replace_module(parent, target_name, new_module, target)
            _record(config, layer, name, support)
            watch(config, self.model, adapter_name)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Put wrappers around the modules whose parameters a configuration names."""
        config, found = as_ours(peft_config), []
        for path, layer in matched_parameters(config, model):
            parent, target, child_name = _get_submodules(model, path)
            # Around a module, wrappers are in the order of its parameters, the last outermost.
            order = [*base_of(target)._parameters].index
            while isinstance(target, ParameterLayer) and (
                order(target.parameter_name) > order(layer.parameter_name)
            ):
                parent, target, child_name = target, target.base_layer, "base_layer"
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    config, adapter_name, target, child_name, parent, path, layer.parameter_name
                )
            found.append(name_of_layer(path, layer))
        return found

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        known = model_config.get("model_type") in self.target_module_mapping
        parameters = getattr(peft_config, "target_parameters", None)
        if peft_config.target_modules is None and parameters and not known:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _copy_adapter_of_same_config(self, layer: ShiraLayer, config: ShiraConfig) -> None:
        """TRL adds its reference with the policy's config object and means a copy of the policy.

        It copies by names that contain ".default."; those of SHiRA's values end in ".default".
        """
        for name in layer.shira_weight:
            if name != REFERENCE and self.peft_config.get(name) is config:
                layer.shira_indices[REFERENCE] = layer.shira_indices[name].clone()
                layer.chosen[REFERENCE] = layer.chosen[name]
                copied = layer.shira_weight[name].detach().clone()
                layer.shira_weight[REFERENCE] = nn.Parameter(copied, requires_grad=False)
                return

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP asks whatever it wraps; PeftModel and a compiled model hand the question on to here.
        inner = [f"model.{name}" for name in ignored_by_ddp(self.model)]
        outer = [*inner, *(f"base_model.{name}" for name in inner)]
        return [*outer, *(f"_orig_mod.{name}" for name in outer)]

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Unloaded: what comes back is as it was, to the bit. PEFT would look for a weight, which a
        # head of several layers (modules_to_save) has not.
        if isinstance(child, (ShiraLayer, AuxiliaryTrainingWrapper)):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        for name, config in self.peft_config.items():  # its layers will not be there to look at
            if isinstance(config, ShiraConfig):
                vars(config).update(describe(config, self.model, name))
        unload: Any = super()._unload_and_optionally_merge  # annotated None, returns the model
        model = unload(*args, **kwargs)
        ignore_in_ddp(model)
        return model

    def unload(self) -> Any:
        """Return the base model without the adapters, as PEFT's; all of them, or none."""
        with self._all_or_none():
            return super().unload()

    def merge_adapter(self, *args: Any, requantize: bool = False, **kwargs: Any) -> None:
        """Merge into all layers, as PEFT's; if that fails or is interrupted, into none.

        With ``requantize``, quantized weights are unpacked, added to and packed again, by PEFT's
        rules; what that loses is warned of in numbers. Without it they are refused.
        """
        with self._all_or_none(), self._repacking(requantize):
            super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, requantize: bool = False, **kwargs: Any) -> Any:
        """Return the base model with the adapters merged, as PEFT's; see `merge_adapter`."""
        with self._all_or_none(), self._repacking(requantize):
            return super().merge_and_unload(*args, **kwargs)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Put layers, and what is merged into them, back if the body raises, as a warning may."""
        restore, settings = merges_of(self.model), dict(vars(self.model))
        config = getattr(self.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", None)
        try:
            yield
        except BaseException:
            vars(self.model).update(settings)
            restore()
            if tied:  # PEFT notes that they have diverged
                config.tie_word_embeddings = tied  # type: ignore[union-attr]
            raise

    @contextmanager
    def _repacking(self, wanted: bool) -> Iterator[None]:
        """Let layers be packed again if it is ``wanted``; say then what it has done to them."""
        before = self._repacks
        layers = [*layers_of(self.model).values()] if wanted or before else []

        def let(repack: bool) -> None:
            for layer in layers:
                layer.requantize = repack
            self._repacks = repack

        try:
            let(wanted)
            yield
            done = [layer.repacked for layer in layers if layer.repacked is not None]
            if wanted and done:
                nonzero, lost, beside, entries = map(sum, zip(*done, strict=True))
                warnings.warn(
                    f"packing {len(done)} quantized weights again has lost {lost:,} of {nonzero:,} "
                    "deltas (their entries are what they were) and changed "
                    f"{beside:,} of the other {entries - nonzero:,} entries",
                    stacklevel=4,
                )
        except BaseException:
            let(before)  # what is merged so can be scaled still
            raise

    def unmerge_adapter(self) -> None:
        """Unmerge all layers, as PEFT's; an interrupt comes when all are unmerged.

        Raises:
            MergeError: If a weight is another than the one that was merged into; all stay merged.
        """
        for layer in layers_of(self.model).values():
            layer.check_unmergeable()
        try:
            super().unmerge_adapter()
        except BaseException:
            for layer in layers_of(self.model).values():
                with onload_layer(layer):
                    layer.merge_only([])
            raise

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        density: float | None = None,
        majority_sign_method: str | None = None,
        k: int | None = None,
        epsilon: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Fuse adapters of this model into a further one, on the union of their entries.

        The new adapter is frozen and not active, as LoRA's is. Its config records r with
        k = r (m + n), as PEFT counts; deltas are filled up to that with zeros where the weights
        have room, so that PEFT's own SHiRA can load what is saved. Scales that were set count.

        Args:
            adapters: Names of adapters of this model.
            weights: A factor for each.
            adapter_name: Name of the new one.
            combination_type: PEFT's ``"linear"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"``,
                ``"magnitude_prune"``, or a method of `shira.fuse`.
            density: See `shira.fuse`; the share of its entries that each adapter keeps.
            majority_sign_method: ``"total"`` or ``"frequency"``.
            k: Entries of the result, for ``"magnitude"``.
            epsilon: For ``"della"``.
            seed: Of the types that drop at random; default 0. No global generator is used.

        Raises:
            UnknownAdapterError: If there is no adapter of a name.
            AdapterError: If ``adapter_name`` is taken, or two adapters train one module whole.
            ConfigError: If type, weights or options are not possible.
        """
        if isinstance(adapters, str):
            raise ConfigError(f"adapters is a list of names, not {adapters!r}")
        for name in adapters:
            if name not in self.peft_config:
                raise UnknownAdapterError(
                    f"Adapter {name} does not exist; the model has {', '.join(self.peft_config)}."
                    f"{did_you_mean(name, self.peft_config)}"
                )
        if adapter_name in self.peft_config:
            raise AdapterError(
                f"there is an adapter {adapter_name!r} already; delete_adapter({adapter_name!r}) "
                "makes room for another"
            )
        trained_whole: dict[str, tuple[ModulesToSaveWrapper, str]] = {}
        for name, wrapper in self.model.named_modules():
            if not isinstance(wrapper, ModulesToSaveWrapper):
                continue
            owners = [adapter for adapter in adapters if adapter in wrapper.modules_to_save]
            if len(owners) > 1:
                raise AdapterError(
                    "Cannot add weighted adapters if they target the same module with "
                    f"modules_to_save: {name!r} is trained whole by {owners[0]!r} and "
                    f"{owners[1]!r}. To fuse the sparse parts alone, use shira.fuse on "
                    "Adapter.from_model(model, name)"
                )
            if owners:
                trained_whole[name] = wrapper, owners[0]
        options: dict[str, Any] = {"density": density, "k": k, "epsilon": epsilon, "seed": seed}
        if majority_sign_method != "total":  # which is the default
            options["majority_sign_method"] = majority_sign_method
        fused, config = fused_adapter(self.model, adapters, weights, combination_type, **options)
        config.modules_to_save = list(trained_whole) or None
        for field in ("task_type", "base_model_name_or_path", "revision"):  # of the one model
            setattr(config, field, getattr(self.peft_config[adapters[0]], field))
        with as_it_was(self):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            for path, layer in layers_of(self.model, adapter_name).items():
                values = fused[name_of_layer(path, layer)].values
                values = values.to(layer.shira_weight[adapter_name].device, copy=True)
                layer.shira_weight[adapter_name] = nn.Parameter(values, requires_grad=False)
            for wrapper, owner in trained_whole.values():
                wrapper.update(adapter_name)
                copy = wrapper.modules_to_save[adapter_name]
                copy.load_state_dict(wrapper.modules_to_save[owner].state_dict())
                copy.requires_grad_(False)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        return adapter_names_in_effect(self, kwargs.get("adapter_names"), kwargs.get("num_beams"))

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        names: list[str] = []
        with suppress(NotImplementedError):  # a model that does not tell its embeddings
            names = super()._get_module_names_tied_with_embedding()
        return names

    def _check_merge_allowed(self) -> None:
        """Refuse weights that cannot be merged into, before anything is merged."""
        super()._check_merge_allowed()
        layers = [module for module in self.model.modules() if isinstance(module, ShiraLayer)]
        for layer in layers:
            layer.check_mergeable(list(layer.shira_weight))
        refuse_merging_shared_weights(self.model, layers)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        found: list[str] = super()._get_tied_target_modules(model)
        tied = found and any(getattr(m, "tied_to", None) is not None for m in model.modules())
        return [] if tied else found

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        if not peft_config.ensure_weight_tying:
            super()._check_tied_modules(model, peft_config)
        elif peft_config.modules_to_save:
            tied = self._get_module_names_tied_with_embedding()
            names = [name.rpartition(".")[2] for name in peft_config.modules_to_save]
            if tied and set(names) & {*EMBEDDING_LAYER_NAMES}:
                LoraModel._add_modules_to_save_to_tie(self, peft_config, tied)  # type: ignore[arg-type]
        elif not owners_of(model):
            warnings.warn(
                "You have requested `ensure_weight_tying`, but no tied modules were found in the "
                "model",
                stacklevel=2,
            )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # In place: PEFT goes on to look for modules_to_save in this, its own, dictionary.
        state = whole_state(model, config, adapter_name, state_dict)
        state_dict.clear()
        state_dict.update(state)
        result: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        stored = keys_in_file(model, adapter_name)
        result = {without_wrappers(stored.get(key, key)): tensor for key, tensor in result.items()}
        return in_few_bytes(result, config.save_dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if is_elsewhere(state_dict):
            return state_dict
        # Modules trained whole have the model's own names here; their shapes are PEFT's to compare.
        state_dict = named_for_loading(model, adapter_name, state_dict, loaded_whole=True)
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return check_state_dict(model, adapter_name, remapped)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters.

        Args:
            adapter_name: One or several; none, as after the last one was deleted, is the base.
            inference_mode: Leave them frozen.
        """
        if adapter_name:
            super().set_adapter(adapter_name, inference_mode)
            return
        for module in self.model.modules():
            if isinstance(module, (ShiraLayer, AuxiliaryTrainingWrapper)):
                module.set_adapter([])
        self.active_adapter = []

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; without the last one the model runs as the base.

        Args:
            adapter_name: Its name.
        """
        with as_it_was(self):
            super().delete_adapter(adapter_name)
        self._latest_samples = ()  # which keep its values
        if not self.peft_config:
            self.peft_config = self.model.peft_config = _Configs()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Enable or disable all adapters; enabled again, they are trainable where they were.

        The layers do it themselves (`ShiraLayer.enable_adapters`), modules trained whole do not.
        """
        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    stack.enter_context(trainable_as_before(module, module, enabled))
            super()._enable_adapter_layers(enabled)


class _Configs(dict[str, Any]):
    """The configurations of a model's adapters; PEFT asks for one also when there is no adapter."""

    def __missing__(self, name: str) -> ShiraConfig:
        if name == BASE:
            return ShiraConfig(inference_mode=True)
        raise KeyError(name)


def choose_entries(
    config: ShiraConfig,
    target: Target,
    incoming: dict[str, Support] | None = None,
    matched: Matched | None = None,
) -> Support:
    """Check that a target can be adapted and choose its entries, unless a file has them.

    With rows of tokens they are those, and the target's own beside them if it is matched by name.
    """
    check_target(target)
    name = target.name
    if incoming is not None and name in incoming:
        return incoming[name]
    rows = None if matched is None or target.of_parameter else matched.rows.get(target.path)
    if rows is None or matched is None:
        return support_of_layer(config, target.layer, name, config.rank_of(name))
    whole = support_of_rows(full_shape(weight_of(target.layer)), rows)
    if target.path not in matched.by_name:
        return whole
    return support_of_layer(config, target.layer, name, config.rank_of(name)).union(whole)


def _record(config: ShiraConfig, layer: Layer, name: str, support: Support) -> None:
    """Write into the config what a reader of the saved file needs to know of the base."""
    config.shira_shapes = {**(config.shira_shapes or {}), name: list(support.shape)}
    values = base_values(layer, support)
    if values is not None:
        for field, told in fingerprint_fields({name: values}).items():
            setattr(config, field, {**(getattr(config, field) or {}), **told})
