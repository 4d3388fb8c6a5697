# SPDX-License-Identifier: Apache-2.0
"""`nn.MultiheadAttention` as a target: its input projections and ``out_proj``, as one module."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad, vmap

from shira import Adapter, PeftModel, ShiraConfig, Switch, calibrate, convert, get_peft_model
from shira.errors import AdapterError, TargetError

from .models import base_weights, randomize, same_weights

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.zeros(3, 5, dtype=torch.bool).index_fill_(1, torch.tensor([4]), True)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)

# How the attention is made, and how it is called.
CASES = {
    "itself": ({}, lambda a: a(X, X, X)),
    "no weights": ({"bias": False}, lambda a: a(X, X, X, need_weights=False)),
    "time first": ({"batch_first": False}, lambda a: a(X, X, X, average_attn_weights=False)),
    "one sequence": ({}, lambda a: a(X[0], X[0], X[0])),
    "masked": ({}, lambda a: a(X, X, X, key_padding_mask=HIDDEN)),
    "causal": ({}, lambda a: a(X, X, X, attn_mask=CAUSAL, is_causal=True, need_weights=False)),
    "another": ({}, lambda a: a(X, OTHER, OTHER)),
    "three": ({}, lambda a: a(query=X, key=OTHER, value=OTHER + 1)),
    "added": ({"add_bias_kv": True, "add_zero_attn": True}, lambda a: a(X, X, X)),
    "sizes": ({"kdim": 6, "vdim": 7}, lambda a: a(X, OTHER[..., :6], OTHER[..., :7])),
}


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        options = {"batch_first": True, **options}
        self.attn, self.lin = nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 4)

    def forward(self, x):
        return self.lin(self.attn(x, x, x, need_weights=False)[0])


def fresh(**options):
    torch.manual_seed(0)
    return Net(**options).requires_grad_(False)  # or torch sums in another order


def adapted(base=None, targets=("attn",), seed=0, **options):
    options = {"density": 0.4, "random_seed": seed, **options}
    base = fresh() if base is None else base
    model = get_peft_model(base, ShiraConfig(target_modules=[*targets], **options))
    randomize(model, seed)
    return model


@pytest.fixture(autouse=True)
def _torchs_slow_path():
    """torch's fused path sums in another order; it is taken where no weight is adapted."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("name", CASES)
def test_is_its_merged_model(name, mode):
    options, call = CASES[name]
    model = adapted(fresh(**options))
    net = model.base_model.model.train(mode == "train")
    weights = base_weights(model)
    merged = copy.deepcopy(model).merge_and_unload().train(mode == "train")
    assert type(merged.attn) is nn.MultiheadAttention
    assert type(merged.attn.out_proj) is type(fresh().attn.out_proj)
    with torch.set_grad_enabled(mode != "no_grad"):
        got, want = call(net.attn), call(merged.attn)
    for one, other in zip(got, want, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert same_weights(base_weights(model), weights)
    if mode != "train":
        return
    trained = Adapter.from_model(model)
    for parameter in (dict(merged.named_parameters())[name] for name in trained):
        parameter.requires_grad_(True)
    got[0].square().sum().backward()
    call(merged.attn)[0].square().sum().backward()
    dense = dict(merged.named_parameters())
    for layer in (m for m in net.modules() if hasattr(m, "shira_weight")):
        want = dense[layer.weight_name].grad.flatten()[layer.support("default").indices.long()]
        torch.testing.assert_close(layer.shira_weight["default"].grad, want)
    assert all(torch.equal(a, b) for a, b in zip(
        model.unload().state_dict().values(), fresh(**options).state_dict().values(), strict=True
    ))  # fmt: skip


def test_nothing_dense_is_kept_for_backward():
    net = nn.MultiheadAttention(64, 2, batch_first=True)
    model = adapted(nn.ModuleDict({"attn": net}), density=0.05)
    x, saved = torch.randn(2, 3, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.base_model.model["attn"](x, x, x)
    weights = {p.data_ptr() for p in net.parameters()}
    kept = [t for t in saved if t.data_ptr() not in weights and t.numel() >= 64 * 64]
    assert not kept, [t.shape for t in kept]


def test_parts_by_name_and_left_out():
    both = {"attn.in_proj_weight", "attn.out_proj.weight"}
    assert set(Adapter.from_model(adapted())) == both
    assert set(Adapter.from_model(adapted(targets=["attn", "out_proj"]))) == both
    config = ShiraConfig(target_modules=".*attn.*", density=0.4)
    assert set(Adapter.from_model(get_peft_model(fresh(), config))) == both
    sizes = {"kdim": 6, "vdim": 7}
    separate = {f"attn.{part}_proj_weight" for part in "qkv"} | {"attn.out_proj.weight"}
    assert set(Adapter.from_model(adapted(fresh(**sizes)))) == separate
    for part in ("out_proj", "in_proj_weight"):
        (left,) = (name for name in both if part not in name)
        assert set(Adapter.from_model(adapted(exclude_modules=[part]))) == {left}
    assert set(Adapter.from_model(adapted(targets=["out_proj"]))) == {"attn.out_proj.weight"}
    ranks = {"in_proj_weight": 1, "attn.out_proj": 3}
    adapter = Adapter.from_model(adapted(density=None, r=2, rank_pattern=ranks))
    counts = {name: delta.nnz for name, delta in adapter.items()}
    assert counts == {"attn.in_proj_weight": 24 + 8, "attn.out_proj.weight": 3 * 16}


@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 8}, {"kdim": 6, "vdim": 7}])
def test_saved_loaded_switched_and_merged(tmp_path, sizes):
    def call(model):
        return model(X) if sizes.get("kdim", 8) == 8 else CASES["sizes"][1](model.attn)[0]

    model = adapted(fresh(**sizes)).eval()
    inner = model.base_model.model
    want, adapter = call(inner), Adapter.from_model(model)
    model.save_pretrained(tmp_path / "ours")
    adapter.save(tmp_path / "composed", format="peft")
    adapter.save(tmp_path / "compact.safetensors")
    for file in ("ours", "composed", "compact.safetensors"):
        assert Adapter.load(tmp_path / file) == adapter
    assert set(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == {
        f"base_model.model.{name.removesuffix('.weight')}.shira_{kind}"
        for name in adapter
        for kind in ("weight", "indices")
    }
    for folder in ("ours", "composed"):
        again = PeftModel.from_pretrained(fresh(**sizes), tmp_path / folder).eval()
        assert torch.equal(call(again.base_model.model), want)
        again.load_adapter(tmp_path / "composed", "second")
        again.set_adapter("second")
        assert Adapter.from_model(again, "second") == adapter
        assert torch.equal(call(again.base_model.model), want)
    base = fresh(**sizes).eval()
    before, clean = call(base), {k: v.clone() for k, v in base.state_dict().items()}
    switch = Switch(base)
    switch.load("a", tmp_path / "ours")
    for _ in range(3):
        with switch.using("a"):
            assert torch.equal(call(base), want)
        assert torch.equal(call(base), before)
    save_file(clean, tmp_path / "base.safetensors")
    convert.merge(adapter, tmp_path / "base.safetensors", tmp_path / "merged.safetensors")
    merged = model.merge_and_unload().state_dict()
    on_disk = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(on_disk[name], value) for name, value in merged.items())


def test_two_adapters_live_together():
    model = adapted()
    first = model(X)
    weights = base_weights(model)
    for targets in (["attn"], ["attn.out_proj", "lin"]):
        config = ShiraConfig(target_modules=targets, density=0.2, random_seed=1)
        model.add_adapter("second", config)
        assert torch.equal(model(X), first)
        names = set(Adapter.from_model(model, "second"))
        want = {
            "attn.out_proj.weight",
            "attn.in_proj_weight" if "attn" in targets else "lin.weight",
        }
        assert names == want
        model.set_adapter("second")
        randomize(model, seed=5)
        second = model(X)
        model.base_model.set_adapter(["default", "second"])
        both = model(X)
        assert not torch.equal(both, second)
        model.merge_adapter()
        torch.testing.assert_close(model(X), both, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(model(X), both)
        model.delete_adapter("second")
        model.set_adapter("default")
        first = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), fresh()(X))
    assert same_weights(base_weights(model), weights)
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_parameters() if "shira" in name]


def test_an_adapter_of_nothing_but_what_is_inside(tmp_path):
    model = adapted()
    for name, targets in (("second", ["out_proj"]), ("third", "attn.out_proj")):
        config = ShiraConfig(target_modules=targets, density=0.2, random_seed=1)
        model.add_adapter(name, config)
        assert config.target_modules == (targets if isinstance(targets, str) else {*targets})
        assert set(Adapter.from_model(model, name)) == {"attn.out_proj.weight"}
    randomize(model, seed=5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path)
    for name in ("second", "third"):
        loaded.load_adapter(tmp_path / name, name)
        loaded.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(loaded(X), model(X))
        alone = PeftModel.from_pretrained(fresh(), tmp_path / name)
        torch.testing.assert_close(alone(X), model(X))


def test_inside_torchs_transformer_layers():
    kinds = {
        nn.TransformerEncoderLayer: lambda layer: layer(X),
        nn.TransformerDecoderLayer: lambda layer: layer(X, OTHER),
    }
    for kind, call in kinds.items():
        torch.manual_seed(0)
        base = nn.ModuleDict({"layer": kind(8, 2, 16, dropout=0.0, batch_first=True)})
        targets = ["self_attn", "linear1", "multihead_attn"]
        targets = targets[: 3 if kind is nn.TransformerDecoderLayer else 2]
        model = adapted(base, targets)
        merged = copy.deepcopy(model).merge_and_unload()
        for training in (True, False):
            inner = model.base_model.model.train(training)["layer"]
            assert torch.equal(call(inner), call(merged.train(training)["layer"]))
            torch.backends.mha.set_fastpath_enabled(True)
            with torch.no_grad():
                torch.testing.assert_close(call(inner), call(merged["layer"]))
            torch.backends.mha.set_fastpath_enabled(False)


def test_trains_and_is_chosen_by_gradients():
    def loss_fn(model, batch):
        return (model(batch) - 1).square().mean()

    config = ShiraConfig(target_modules=["attn"], r=1, mask_type="grad")
    model = get_peft_model(fresh(), calibrate(fresh(), config, [X], loss_fn=loss_fn))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = loss_fn(model, X)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_state_dicts_copies_and_one_name_for_a_batch():
    model = adapted().eval()
    want = model(X)
    again = adapted(seed=3).eval()
    assert not torch.equal(again(X), want)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), want)
    assert torch.equal(copy.deepcopy(model)(X), want)
    assert torch.equal(model(X, adapter_names=["default"] * 3), want)
    with pytest.raises(AdapterError, match="must be all the same"):
        model(X, adapter_names=["default", "__base__", "default"])


def test_derivatives_and_compiled():
    model = adapted().double()
    x = X.double()
    values = {n: p for n, p in model.named_parameters() if ".shira_weight." in n}

    def loss(values, x):
        return functional_call(model, values, (x,)).square().mean()

    def function(*given):
        return loss(dict(zip(values, given, strict=True)), x)

    # need_weights=True: torch's fused attention has no second derivative
    attend = model.base_model.model.attn
    assert torch.autograd.gradgradcheck(
        lambda x: attend(x, x, x)[0], (x[:1, :2].requires_grad_(),), fast_mode=True
    )
    plain = {name: value.detach() for name, value in values.items()}
    each = vmap(grad(loss), (None, 0))(plain, x[:, None])
    for at in range(len(x)):
        for name, want in grad(loss)(plain, x[at : at + 1]).items():
            torch.testing.assert_close(each[name][at], want)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_under_fsdp1():
    """Which has a plain attribute before each parameter while a model is called."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for targets in (["attn"], ["lin"]):
            base = fresh()
            base.lin = Scaled(8, 4)
            model = adapted(base, targets)
            with model.disable_adapter():
                before = model(X)
            want = model(X)
            options = {"use_orig_params": True, "device_id": torch.device("cpu")}
            torch.testing.assert_close(FullyShardedDataParallel(model, **options)(X), want)
            assert not torch.allclose(before, want, atol=1e-2)
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_is_refused():
    base = fresh()
    nn.utils.parametrizations.weight_norm(base.attn, "in_proj_weight")
    before = dict(base.named_modules())
    with pytest.raises(TargetError, match=r"attn\.in_proj_weight: it is computed"):
        adapted(base, ["attn.in_proj_weight"], target_parameters=["attn.in_proj_weight"])
    with pytest.raises(TargetError, match=r"Target module attn .* is not supported"):
        adapted(base)
    assert dict(base.named_modules()) == before
