# SPDX-License-Identifier: Apache-2.0
"""Convolutions of one to three dimensions, transposed or not, with all that torch's take."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shira import Adapter, PeftModel, ShiraConfig, Switch, convert, get_peft_model
from shira.errors import AdapterError, MaskError

from .merged import adapted, assert_equal, check_against_merged
from .models import randomize

X = torch.randn(2, 4, 6, 5, 3, generator=torch.Generator().manual_seed(0))
KINDS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
OPTIONS = [
    {},
    {"bias": False, "stride": 2},
    {"padding": 1, "dilation": 2},
    {"groups": 2, "stride": 2, "padding": 1},
    {"groups": 4},
    {"padding": "same"},
    {"padding": "same", "dilation": 3, "padding_mode": "circular"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "groups": 2},
]


def input_of(kind):
    """Of as many sizes as the layer takes."""
    dims = KINDS.index(kind) if kind in KINDS else TRANSPOSED.index(kind)
    return X[(..., *[0] * (2 - dims))]


def numbers(options):
    """The options that a transposed convolution has too."""
    words = options.get("padding_mode") or isinstance(options.get("padding"), str)
    return not words


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_its_merged_model(kind, options):
    torch.manual_seed(0)
    x = input_of(kind)
    check_against_merged(nn.Sequential(kind(4, 8, 2, **options)), ["0"], lambda model: model(x))
    one = x[0]
    check_against_merged(nn.Sequential(kind(4, 8, 2, **options)), ["0"], lambda model: model(one))


@pytest.mark.parametrize("options", [*filter(numbers, OPTIONS)], ids=str)
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_transposed_is_its_merged_model(kind, options):
    torch.manual_seed(0)
    x, extra = input_of(kind), {"output_padding": 1} if "stride" in options else {}
    base = nn.Sequential(kind(4, 8, 2, **options, **extra))
    check_against_merged(base, ["0"], lambda model: model(x))
    check_against_merged(base, ["0"], lambda model: model(x[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, *TRANSPOSED])
def test_in_other_dtypes_and_layouts(kind, dtype):
    torch.manual_seed(0)
    layer, x = kind(4, 8, 2, groups=2).to(dtype), input_of(kind).to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats:
        layer, x = (each.to(memory_format=formats[x.dim()]) for each in (layer, x))
    check_against_merged(nn.Sequential(layer), ["0"], lambda model: model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_under_autocast(dtype):
    torch.manual_seed(0)
    for kind in (nn.Conv1d, nn.ConvTranspose2d):
        base, x = nn.Sequential(kind(4, 8, 2)), input_of(kind)
        if dtype is torch.float64:
            base, x = base.double(), x.double()
        with torch.autocast("cpu", torch.bfloat16):
            check_against_merged(base, ["0"], lambda model, x=x: model(x))


def test_an_output_size():
    x = input_of(nn.ConvTranspose2d)
    base = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2))
    for call in (
        lambda layer: layer(x, [14, 12]),
        lambda layer: layer(x, output_size=(2, 6, 13, 11)),
        lambda layer: layer(input=x[0], output_size=[14, 11]),
        lambda layer: layer(x, None),
    ):
        check_against_merged(base, ["0"], lambda model, call=call: call(model[0]))
    model = adapted(base, ["0"])
    randomize(model)
    layer = model.base_model.model[0]
    want = layer(x, [14, 12])
    sizes = []
    layer.base_layer.register_forward_hook(lambda *args: sizes.append(args[-1].shape))
    with pytest.warns(UserWarning, match="hooks"):
        assert torch.equal(layer(x, [14, 12]), want)
    assert sizes == [want.shape]
    with pytest.raises(ValueError, match="valid sizes range"):
        layer(x, [20, 12])
    model.eval()
    assert torch.equal(layer(x, [14, 12], adapter_names=["default"] * 2), want)
    with pytest.raises(AdapterError, match=r"0\.weight: .* takes further arguments"):
        layer(x, [14, 12], adapter_names=["default", "__base__"])


@pytest.mark.parametrize("kind", [*KINDS, *TRANSPOSED])
def test_from_training_to_a_merged_checkpoint(kind, tmp_path):
    """Trained, saved both ways, loaded, switched, merged here and on disk: the same bits."""
    x = input_of(kind)

    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(kind(4, 8, 2), nn.ReLU(), kind(8, 4, 2, groups=4))

    base = fresh()
    want = torch.randn(base(x).shape)
    config = ShiraConfig(density=0.3, target_modules=["0", "2"], random_seed=0)
    model = get_peft_model(fresh(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = (model(x) - want).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.99

    model.eval().save_pretrained(tmp_path / "peft")
    adapter = Adapter.from_model(model)
    adapter.save(tmp_path / "compact.safetensors")
    assert Adapter.load(tmp_path / "compact.safetensors") == adapter
    assert Adapter.load(tmp_path / "peft") == adapter
    assert adapter["0.weight"].support.shape == tuple(base[0].weight.shape)
    result = model(x)
    assert torch.equal(PeftModel.from_pretrained(fresh(), tmp_path / "peft").eval()(x), result)

    switch = Switch(base)
    switch.load("a", tmp_path / "compact.safetensors")
    before = base(x)
    with switch.using("a"):
        assert torch.equal(base(x), result)
    assert torch.equal(base(x), before)
    original = {name: value.clone() for name, value in base.state_dict().items()}

    save_file(base.state_dict(), tmp_path / "base.safetensors")
    convert.merge(adapter, tmp_path / "base.safetensors", tmp_path / "merged.safetensors")
    merged = model.merge_and_unload().state_dict()
    on_disk = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(on_disk[name], value) for name, value in merged.items())
    found = convert.extract(tmp_path / "base.safetensors", tmp_path / "merged.safetensors")
    base.load_state_dict(original)
    switch = Switch(base)
    switch.load("found", found.adapter)
    with switch.using("found"):
        assert all(torch.equal(base.state_dict()[name], value) for name, value in merged.items())


MASKS = {"random": {}, "struct": {}, "magnitude": {}, "block": {"block_size": 2}}


@pytest.mark.parametrize("mask_type", MASKS)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d])
def test_the_budget_is_that_of_the_weight_as_a_matrix(kind, mask_type):
    options = {"mask_type": mask_type, "mask_options": MASKS[mask_type] or None}
    base = nn.Sequential(kind(8, 6, 3))
    rows, cols = base[0].weight.shape[0], base[0].weight[0].numel()
    model = adapted(base, ["0"], r=2, density=None, **options)
    layer = model.base_model.model[0]
    wanted = 2 * (rows + cols)
    assert layer.shira_weight["default"].numel() == wanted
    assert layer.get_delta_weight("default").shape == (rows, cols)
    if mask_type == "magnitude":
        chosen = layer.get_base_layer().weight.abs().flatten()[layer.support("default").indices]
        assert chosen.min() >= layer.get_base_layer().weight.abs().flatten().sort().values[-wanted]


def test_a_depthwise_convolution_has_room_for_few():
    base = nn.Sequential(nn.Conv1d(8, 8, 4, groups=8))
    with pytest.raises(MaskError, match=r"8 x 4 weight.*largest r that fits is 2"):
        adapted(base, ["0"], r=3, density=None)
    assert adapted(base, ["0"], r=2, density=None).base_model.model[0].r == {"default": 2}


@pytest.mark.parametrize("kind", [*KINDS, *TRANSPOSED])
def test_a_mixed_batch(kind):
    x = input_of(kind)
    model = adapted(nn.Sequential(kind(4, 8, 2)), ["0"])
    model.add_adapter("other", ShiraConfig(density=0.3, target_modules=["0"], random_seed=1))
    randomize(model)
    model.eval()
    got = model(x, adapter_names=["other", "__base__"])
    model.set_adapter("other")
    assert_equal(got[:1], model(x[:1]))
    with model.disable_adapter():
        assert_equal(got[1:], model(x[1:]))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d])
def test_compiled_whole(kind):
    torch._dynamo.reset()
    x = input_of(kind)
    model = adapted(nn.Sequential(kind(4, 8, 2, stride=2)), ["0"]).base_model.model
    randomize(model)
    (value,) = [p for p in model.parameters() if p.requires_grad]
    want = model(x)
    (gradient,) = torch.autograd.grad(want.square().sum(), value)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), value)[0], gradient)
