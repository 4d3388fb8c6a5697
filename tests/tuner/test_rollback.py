# SPDX-License-Identifier: Apache-2.0
"""Adding or loading that fails leaves the model as it was, whatever it fails on."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftMixedModel, get_peft_model_state_dict, save_as_lora
from safetensors.torch import load_file, save_file
from torch import nn

from shira import PeftModel, ShiraConfig, get_peft_model
from shira.errors import AdapterError, FileFormatError, ShiraError, TargetError, WrongBaseError
from shira.tuner.layer import ShiraLayer

from .experts import mixture
from .models import base_weights, llama, mlp, randomize, same_weights

X = torch.arange(12)[None]
HEAD = "base_model.model.lm_head.weight"


def config(**options):
    options = {"r": 1, "target_modules": ["q_proj"], "random_seed": 1, **options}
    return ShiraConfig(**options)


def saved(path, **options):
    model = get_peft_model(llama(), config(modules_to_save=["lm_head"], **options)).eval()
    randomize(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(path)
    return model


def respelled(path, change):
    file = path / "adapter_model.safetensors"
    tensors = dict(change(load_file(file)))
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def pickled(path):
    """In the place of the safetensors file, for which nothing can be checked beforehand."""
    file = path / "adapter_model.safetensors"
    torch.save(load_file(file), path / "adapter_model.bin")
    file.unlink()


def picture(model):
    """Everything but the values."""
    return {
        "modules": list(model.named_modules()),
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": sorted({name for m in model.modules() for name in m.__dict__}),
        "configs": dict(getattr(model, "peft_config", {})),
        "active": [getattr(m, "_active_adapter", None) for m in model.modules()],
        "scaling": [str(getattr(m, "scaling", None)) for m in model.modules()],
    }


def no_head(tensors):
    return {key: value for key, value in tensors.items() if key != HEAD}


def small_head(tensors):
    return {**tensors, HEAD: torch.zeros(3, 3)}


def one_too_many(tensors):
    return {**tensors, "base_model.model.classifier.weight": torch.zeros(2, 2)}


SPOILT = {"no head": no_head, "small head": small_head, "one too many": one_too_many}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_whole_modules_that_are_wrong(tmp_path, kind, form, low_cpu_mem_usage):
    saved(tmp_path / "good")
    saved(tmp_path / "bad", random_seed=2)
    respelled(tmp_path / "bad", SPOILT[kind])
    if form == "bin":
        pickled(tmp_path / "bad")
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, values = picture(model), base_weights(model)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    with pytest.raises(ShiraError):
        PeftModel.from_pretrained(model, tmp_path / "bad", **options)
    assert picture(model) == before
    model = PeftModel.from_pretrained(model, tmp_path / "good", **options)
    want, before = model(X).logits, picture(model)
    with pytest.raises(ShiraError):
        model.load_adapter(tmp_path / "bad", "bad", **options)
    with pytest.raises(ShiraError):
        model.load_adapter(tmp_path / "bad", "default", **options)
    assert picture(model) == before
    assert torch.equal(model(X).logits, want)
    unloaded = base_weights(model.unload())
    unloaded["lm_head.weight"] = values["lm_head.weight"]  # PEFT leaves the trained one there
    assert same_weights(unloaded, values)


def test_mixed_models(tmp_path):
    saved(tmp_path / "good")
    saved(tmp_path / "bad")
    respelled(tmp_path / "bad", no_head)
    model = PeftMixedModel(llama(), config(modules_to_save=["lm_head"]), "first")
    before = picture(model)
    with pytest.raises(ShiraError):
        model.load_adapter(tmp_path / "bad", "bad")
    with pytest.raises(ValueError, match="nowhere"):
        model.add_adapter("worse", config(target_modules=["nowhere"]))
    assert picture(model) == before
    model.load_adapter(tmp_path / "good", "good")


@pytest.mark.parametrize("kind", ["positions", "target"])
def test_transformers_own_methods(tmp_path, kind):
    model = llama()
    before = picture(model)
    wrong = config(target_modules=["nowhere"]) if kind == "target" else config(r=10_000)
    with pytest.raises(ShiraError):
        model.add_adapter(wrong)
    assert picture(model) == before
    assert not model._hf_peft_config_loaded
    model.add_adapter(config())
    before = picture(model)
    with pytest.raises(ShiraError):
        model.add_adapter(wrong, "second")
    assert picture(model) == before


def not_finite(tensors):
    key = next(key for key in tensors if "shira_weight" in key)
    tensors[key][0] = float("nan")
    return tensors


def out_of_range(tensors):
    key = next(key for key in tensors if "shira_indices" in key)
    tensors[key][0, -1] = 900
    return tensors


def data_parallel(tensors):
    return {f"module.{key}": value for key, value in tensors.items()}


NATIVE = {**SPOILT, "NaN": not_finite, "range": out_of_range, "module.": data_parallel}


loads_heads = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10"), reason="modules_to_save are refused there"
)


@loads_heads
@pytest.mark.parametrize("how", ["path", "state dict"])
@pytest.mark.parametrize("kind", NATIVE)
def test_transformers_own_loading(tmp_path, kind, how):
    want = saved(tmp_path)(X).logits
    tensors = respelled(tmp_path, dict)
    model = llama()
    if how == "path":
        options = {"peft_model_id": str(tmp_path)}
    else:
        chosen = ShiraConfig.from_pretrained(tmp_path)
        chosen._source = None
        options = {"peft_config": chosen, "adapter_state_dict": tensors}
    model.load_adapter(**options)
    assert torch.equal(model(X).logits, want)
    tensors = respelled(tmp_path, NATIVE[kind])
    if how == "state dict":
        options = {"peft_config": chosen, "adapter_state_dict": tensors}
    for target in (llama(), model):
        before = picture(target)
        with pytest.raises((ShiraError, RuntimeError)):  # transformers refuses sizes itself
            target.load_adapter(**options, adapter_name="new")
        assert picture(target) == before


@loads_heads
def test_transformers_own_loading_of_unsorted_positions(tmp_path):
    want = saved(tmp_path)(X).logits
    chosen = ShiraConfig.from_pretrained(tmp_path)
    chosen._source = None

    def backwards(tensors):
        return {k: v.flip(-1).contiguous() if "shira_" in k else v for k, v in tensors.items()}

    model = llama()
    model.load_adapter(peft_config=chosen, adapter_state_dict=respelled(tmp_path, backwards))
    assert torch.equal(model(X).logits, want)


def test_transformers_own_loading_on_another_base(tmp_path):
    saved(tmp_path)
    other = llama(seed=5)
    before = picture(other)
    with pytest.raises(WrongBaseError, match="wrong base"):
        other.load_adapter(str(tmp_path))
    assert picture(other) == before


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)


def test_an_interrupt_while_layers_are_put_in(monkeypatch):
    from shira.tuner.model import ShiraModel

    model, put = Twice(), ShiraModel._replace_module

    def interrupted(self, parent, name, *args):
        put(self, parent, name, *args)
        if name == "two":
            raise KeyboardInterrupt

    before = picture(model)
    monkeypatch.setattr(ShiraModel, "_replace_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, config(target_modules=["one", "two"]))
    assert picture(model) == before


PREFIXES = {
    "without": lambda key: key.removeprefix("base_model.model."),
    "data parallel": lambda key: f"module.{key}",
    "data parallel, without": lambda key: f"module.{key.removeprefix('base_model.model.')}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("layers.0", "layers.0._orig_mod"),
    "fsdp": lambda key: f"_fsdp_wrapped_module.{key}",
    "fsdp inside": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "all": lambda key: f"module._orig_mod.{key.replace('.self_attn', '._orig_mod.self_attn')}",
}


@pytest.mark.parametrize("wrapping", PREFIXES)
def test_names_of_another_wrapping(tmp_path, wrapping):
    rename = PREFIXES[wrapping]
    source = saved(tmp_path)
    want = source(X).logits
    model = get_peft_model(llama(), config(random_seed=2, modules_to_save=["lm_head"])).eval()
    state = get_peft_model_state_dict(source)
    peft.set_peft_model_state_dict(model, {rename(key): value for key, value in state.items()})
    assert torch.equal(model(X).logits, want)
    respelled(tmp_path, lambda tensors: {rename(key): t for key, t in tensors.items()})
    if wrapping == "data parallel, without":  # may be what the model calls a part of its own
        with pytest.raises(ShiraError, match=r"module\."):
            PeftModel.from_pretrained(llama(), tmp_path)
        return
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path).eval()(X).logits, want)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(model(X).logits, want)


def test_a_state_dict_for_a_model_without_a_prefix(tmp_path):
    source = get_peft_model(llama(), config()).eval()
    randomize(source)
    state = get_peft_model_state_dict(source)
    for rename in PREFIXES.values():
        model = llama()
        model.add_adapter(config(random_seed=2))
        peft.set_peft_model_state_dict(model, {rename(key): value for key, value in state.items()})
        assert torch.equal(model(X).logits, source(X).logits)


def test_who_imported_the_function_before_shira():
    from peft.utils import save_and_load

    load = save_and_load.set_peft_model_state_dict.__wrapped__
    source = get_peft_model(llama(), config()).eval()
    randomize(source)
    state = get_peft_model_state_dict(source)
    for rename in PREFIXES.values():
        model = get_peft_model(llama(), config(random_seed=2)).eval()
        load(model, {rename(key): value for key, value in state.items()})
        assert torch.equal(model(X).logits, source(X).logits)
    with pytest.raises(FileFormatError, match="no tensor is for adapter"):
        load(model, {})


def test_a_model_with_wrapped_parts(tmp_path):
    source = saved(tmp_path)
    base = llama()
    base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    model = get_peft_model(base, config(random_seed=2, modules_to_save=["lm_head"])).eval()
    peft.set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(model(X).logits, source(X).logits)


def test_a_state_dict_in_which_nothing_matches():
    model = get_peft_model(mlp(), config(target_modules=["lin1"])).eval()
    state = get_peft_model_state_dict(model)
    want = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FileFormatError, match=r"no tensor is for adapter 'default'.*'lin1'"):
        peft.set_peft_model_state_dict(model, {})
    with pytest.raises(FileFormatError, match=r"lin2\.shira_.*no layer.*Did you mean 'lin1'"):
        peft.set_peft_model_state_dict(
            model, {k.replace("lin1", "lin2"): v for k, v in state.items()}
        )
    with pytest.raises(FileFormatError, match="it would be left out"):
        peft.set_peft_model_state_dict(model, {**state, "scale": torch.ones(1)})
    both = {**state, **{f"module.{key}": value for key, value in state.items()}}
    with pytest.raises(AdapterError, match="both names of"):
        peft.set_peft_model_state_dict(model, both)
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())


def test_what_is_not_shiras_is_left_to_peft(tmp_path):
    from peft import LoraConfig
    from peft.utils.hotswap import hotswap_adapter

    chosen = LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), chosen).eval()
    model.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default")
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(X).logits, model(X).logits)
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(llama(), LoraConfig(target_modules=["nowhere"]))


def test_a_wrong_target_is_refused_as_before():
    with pytest.raises(TargetError):
        get_peft_model(mlp(), config(target_modules=["nowhere"]))


# --- warnings that are errors ----------------------------------------------------------------


def two_adapters():
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config(random_seed=2))
    return model


def one_merged():
    model = two_adapters()
    model.merge_adapter(["second"])
    return model


def one_layer_merged():
    model = two_adapters()
    model.model.model.layers[0].self_attn.q_proj.merge()
    return model


def with_a_head_of_its_own():
    return get_peft_model(llama(tie_word_embeddings=True), config(modules_to_save=["lm_head"]))


def experts():
    return get_peft_model(mixture(), ShiraConfig(r=1, target_modules=["q_proj"]))


WARNED = {
    "merging more": (one_merged, lambda model: model.merge_adapter(["default"])),
    "unloading what is merged": (one_merged, lambda model: model.merge_and_unload()),
    "heads untied": (with_a_head_of_its_own, lambda model: model.merge_and_unload()),
    "deleting the active one": (two_adapters, lambda model: model.delete_adapter("default")),
    "all-linear": (
        experts,
        lambda model: model.add_adapter("b", ShiraConfig(r=1, target_modules="all-linear")),
    ),
    "a target that matches nothing": (
        two_adapters,
        lambda model: model.add_adapter("b", config(target_modules=["q_proj", "nowhere"])),
    ),
    "nothing that is tied": (
        two_adapters,
        lambda model: model.add_adapter("b", config(ensure_weight_tying=True)),
    ),
    "to LoRA": (two_adapters, lambda model: save_as_lora("/nowhere", model, rank=1)),
}


@pytest.mark.parametrize("kind", WARNED)
def test_a_warning_that_is_an_error_leaves_all_as_it_was(kind):
    build, act = WARNED[kind]
    model = build()
    randomize(model)
    layers = [module for module in model.modules() if isinstance(module, ShiraLayer)]
    merged = [list(layer.merged_adapters) for layer in layers]
    for layer, names in zip(layers, merged, strict=True):
        layer.merge_only(names)  # of the new values
    before, values = picture(model), {n: t.clone() for n, t in model.state_dict().items()}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Warning):
            act(model)
    assert picture(model) == before
    assert [layer.merged_adapters for layer in layers] == merged
    assert not any(layer.requantize for layer in layers)
    assert same_weights(model.state_dict(), values)
    assert getattr(getattr(model, "config", None), "tie_word_embeddings", None) == tied
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind != "to LoRA":
            act(model)
