# SPDX-License-Identifier: Apache-2.0
"""Adapted models under ``torch.func``, forward mode and gradients of gradients, against torch's own
on the same model with dense weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from shira import ShiraConfig, get_peft_model
from shira.support import matrix_shape

from .experts import EXPERTS, mixture, tokens
from .merged import adapted
from .models import EVERYTHING, everything, randomize
from .test_own_forward import LAYERS

IDS = torch.tensor([[1, 2, 3, 4], [4, 0, 2, 2]])
WIDE = torch.float64


def values_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".shira_weight." in n}


def model_and_reference(make, targets, call, **options):
    """An adapted model and two functions of its values: it, and its base with dense weights."""
    torch.manual_seed(0)
    base = make()
    weights = {name: value.detach().clone() for name, value in base.state_dict().items()}
    model = adapted(base, targets, **options)
    randomize(model)
    torch.manual_seed(0)
    fresh = make().eval()
    for module in fresh.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False  # torch cannot differentiate through a sparse gradient
    layers = {
        name: model.base_model.model.get_submodule(name.removeprefix("base_model.model."))
        for name in (key.partition(".shira_weight")[0] for key in values_of(model))
    }

    def ours(values, *inputs):
        return call(lambda *x: functional_call(model, values, x), *inputs)

    def theirs(values, *inputs):
        dense = dict(weights)
        for path, layer in layers.items():
            name = layer.weight_name
            row, col = layer.shira_indices["default"].long()
            delta = values[f"{path}.shira_weight.default"].to(dense[name].dtype)
            flat = row * matrix_shape(dense[name].shape)[1] + col
            weight = dense[name].flatten().index_put((flat,), delta, accumulate=True)
            dense[name] = weight.view(dense[name].shape)
        return call(lambda *x: functional_call(fresh, dense, x), *inputs)

    return model.eval(), ours, theirs


def a_loss(model, ids):
    return model(ids).square().mean()


def close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.fixture(scope="module")
def everything_adapted():
    return model_and_reference(lambda: everything(dtype=WIDE), EVERYTHING, a_loss)


def test_grad_of_a_functional_call(everything_adapted):
    model, ours, theirs = everything_adapted
    values = values_of(model)
    close(grad(ours)(values, IDS), grad(theirs)(values, IDS))
    model.zero_grad()
    ours(dict(model.named_parameters()), IDS).backward()
    close(grad(ours)(values, IDS), {n: p.grad for n, p in model.named_parameters() if n in values})


def test_gradients_for_each_sample(everything_adapted):
    model, ours, theirs = everything_adapted
    values, samples = values_of(model), IDS[:, None]
    got = vmap(grad(ours), (None, 0))(values, samples)
    for at, sample in enumerate(samples):
        close({name: each[at] for name, each in got.items()}, grad(theirs)(values, sample))


def test_along_a_direction_and_second_order(everything_adapted):
    model, ours, theirs = everything_adapted
    values = values_of(model)
    direction = {name: torch.randn_like(value) for name, value in values.items()}
    for one, other in ((ours, theirs), (grad(ours), grad(theirs))):
        got, want = (jvp(lambda v, f=f: f(v, IDS), (values,), (direction,)) for f in (one, other))
        torch.testing.assert_close(got, want)
    name = next(name for name in values if "along" in name)

    def alone(function):
        return lambda value: function({**values, name: value}, IDS)

    got, want = (jacrev(grad(alone(f)))(values[name]) for f in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_a_gradient_penalty_trains(everything_adapted):
    model, _, theirs = everything_adapted
    values = {n: p for n, p in model.named_parameters() if ".shira_weight." in n}
    leaves = [p.detach().clone().requires_grad_() for p in values.values()]

    def penalty(loss, wanted):
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(loss + sum(g.square().sum() for g in first), wanted)

    got = penalty(a_loss(model, IDS), [*values.values()])
    want = penalty(theirs(dict(zip(values, leaves, strict=True)), IDS), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_an_ensemble_of_values(everything_adapted):
    model, ours, _ = everything_adapted
    members = []
    for seed in range(3):
        randomize(model, seed)
        members.append(values_of(model))
    stacked = {name: torch.stack([each[name] for each in members]) for name in members[0]}
    got = vmap(ours, (0, None))(stacked, IDS)
    torch.testing.assert_close(got, torch.stack([ours(each, IDS) for each in members]))
    each = vmap(ours, (0, 0))({n: v[:2] for n, v in stacked.items()}, IDS[:, None])
    torch.testing.assert_close(
        each, torch.stack([ours(members[i], IDS[i : i + 1]) for i in (0, 1)])
    )


def test_an_ensemble_of_adapters_with_positions_of_their_own():
    models = []
    for seed in range(3):
        config = ShiraConfig(density=0.3, target_modules=EVERYTHING, random_seed=seed)
        models.append(get_peft_model(everything(dtype=WIDE), config).eval())
        randomize(models[-1], seed)
    states = [model.state_dict() for model in models]
    ours = {key: torch.stack([s[key] for s in states]) for key in states[0] if ".shira_" in key}

    def call(state):
        return functional_call(models[0], state, (IDS,))

    got = vmap(call)(ours)
    torch.testing.assert_close(got, torch.stack([model(IDS) for model in models]))


def test_inputs_of_each_layer_and_several_active_adapters():
    model = get_peft_model(
        everything(dtype=WIDE), ShiraConfig(density=0.3, target_modules=EVERYTHING, random_seed=0)
    )
    config = ShiraConfig(density=0.2, target_modules=EVERYTHING, random_seed=1)
    model.add_adapter("other", config)
    randomize(model)
    model.base_model.set_adapter(["default", "other"])
    net = model.base_model.model.eval()
    inputs = {}
    for name in EVERYTHING[1:]:
        handle = net.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].detach()})
        )
        net(IDS)
        handle.remove()
    for name, x in inputs.items():
        layer = net.get_submodule(name)
        many = torch.stack([x, x + 1])
        torch.testing.assert_close(vmap(layer)(many), torch.stack([*map(layer, many)]))
        x.requires_grad_()
        assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_a_forward_of_their_own(name):
    make, x = LAYERS[name]
    dtype = torch.float64 if "bfloat16" not in name else torch.bfloat16
    x = x.double() if x.is_floating_point() else x

    def call(model, x):
        y = model(x)
        y = y if isinstance(y, torch.Tensor) else y[0] + y[1]["logits"]
        return y.double().pow(3).mean()

    model, ours, theirs = model_and_reference(lambda: nn.Sequential(make()).to(dtype), ["0"], call)
    values = values_of(model)
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
    if name != "bits":  # torch.func takes no Function of this kind, in the base neither
        tangents = {n: torch.randn_like(v) for n, v in values.items()}
        got = jvp(lambda v: ours(v, x), (values,), (tangents,))
        want = jvp(lambda v: theirs(v, x), (values,), (tangents,))
        torch.testing.assert_close(got, want, **rounding)
        many = torch.stack([x, x.flip(0)])
        got = vmap(grad(ours), (None, 0))(values, many)
        for at, one in enumerate(many):
            for key, want in grad(theirs)(values, one).items():
                torch.testing.assert_close(got[key][at], want, **rounding)
    second = []
    for function in (lambda v: call(model, x), lambda v: theirs(v, x)):
        given = {n: p for n, p in model.named_parameters() if n in values}
        first = torch.autograd.grad(function(given), [*given.values()], create_graph=True)
        second.append(torch.autograd.grad(first[0].square().sum(), [*given.values()])[0])
    torch.testing.assert_close(*second, **rounding)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_experts_of_a_mixture(way):
    """Gradients of gradients in both ways that experts multiply; torch.func in torch's own."""

    def call(model, ids):
        return model(ids).logits.square().mean()

    ids = tokens()
    sizes = {"implementation": way, "attn_implementation": "eager"}  # sdpa has no such gradients
    model, ours, theirs = model_and_reference(
        lambda: mixture(**sizes), [], call, target_parameters=EXPERTS
    )
    given = {n: p for n, p in model.named_parameters() if ".shira_weight." in n}
    answers = []
    for function in (lambda values: call(model, ids), lambda values: theirs(values, ids)):
        first = torch.autograd.grad(function(given), [*given.values()], create_graph=True)
        penalty = sum(each.square().sum() for each in first)
        answers.append([*first, *torch.autograd.grad(penalty, [*given.values()])])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    values = values_of(model)
    for name, want in grad(theirs)(values, ids).items():
        torch.testing.assert_close(grad(ours)(values, ids)[name], want, rtol=1e-4, atol=1e-5)


def test_a_mixed_batch():
    model = get_peft_model(
        everything(dtype=WIDE), ShiraConfig(density=0.3, target_modules=EVERYTHING, random_seed=0)
    )
    config = ShiraConfig(density=0.2, target_modules=EVERYTHING, random_seed=1)
    model.add_adapter("other", config)
    randomize(model)
    model.eval()
    names = ["other", "__base__"]
    values = {n: p for n, p in model.named_parameters() if ".shira_weight." in n}

    def call(values):
        return functional_call(model, values, (IDS,), {"adapter_names": names}).square().mean()

    for parameter in values.values():
        parameter.requires_grad_()
    loss = model(IDS, adapter_names=names).square().mean()
    wanted = [p for n, p in values.items() if n.endswith("other")]
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    plain = {n: p.detach() for n, p in values.items()}
    got = grad(call)(plain)
    want = grad(lambda v: sum(g.square().sum() for g in grad(call)(v).values()))(plain)
    for (name, _), one, two in zip(
        ((n, p) for n, p in values.items() if n.endswith("other")), first, second, strict=True
    ):
        torch.testing.assert_close(got[name], one.detach())
        torch.testing.assert_close(want[name], two)
    several = {n: torch.stack([v, 2 * v]) for n, v in plain.items()}
    each = torch.stack([call({n: v[at] for n, v in several.items()}) for at in range(2)])
    torch.testing.assert_close(vmap(call)(several), each)
