# SPDX-License-Identifier: Apache-2.0
"""Optimizers, clipping, averages and compiled steps: what they make of the values of an adapter.

Each is held against the plain step: the same optimizer on the same values as parameters of their
own, which a dense model scatters into its weights.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from transformers import Adafactor, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from shira import FactoredAdamW, ShiraConfig, get_peft_model
from shira.errors import ConfigError
from shira.tuner.optimizer import RELATIVE_STEP

from .models import base_weights, llama, randomize, same_weights

STEPS = 6
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


class Net(nn.Module):
    """Large enough for 8-bit states, which bitsandbytes has from 4096 values on."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 256), nn.Linear(256, 128), nn.Linear(128, 8)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(24, 32, generator=generator), torch.randn(24, 8, generator=generator)


def net():
    torch.manual_seed(0)
    return Net()


def adapted(**options):
    options = {"target_modules": ["a", "b"], "density": 0.19, "random_seed": 0} | options
    model = get_peft_model(net(), ShiraConfig(**options))
    randomize(model, scale=0.02)
    return model


class Plain(nn.Module):
    """The dense model that an adapted one stands for: values scattered into clones of weights."""

    def __init__(self, model):
        super().__init__()
        self.net = model.get_base_model()
        layers = [m for m in self.net.modules() if hasattr(m, "shira_weight")]
        self.layers = layers
        self.values = nn.ParameterList(m.shira_weight["default"].detach().clone() for m in layers)
        self.at = [m.support("default").indices.long() for m in layers]

    def forward(self, x):
        for layer, at, value in zip(self.layers, self.at, self.values, strict=True):
            base = layer.get_base_layer()
            weight = base.weight.detach().flatten().index_add(0, at, value).view_as(base.weight)
            x = torch.tanh(F.linear(x, weight, base.bias))
        return self.net.c(x)


def layers(model):
    return [m for m in model.modules() if hasattr(m, "shira_weight")]


def values_of(model):
    if isinstance(model, Plain):
        return list(model.values)
    return [p for n, p in model.named_parameters() if "shira_weight" in n]


def loss_of(model, step):
    x, y = data(step)
    return F.mse_loss(model(x), y)


def train(model, make, steps=STEPS, before=lambda values: None, after=lambda: None):
    values = values_of(model)
    optimizer = make(values)
    for step in range(steps):
        loss_of(model, step).backward()
        before(values)
        optimizer.step()
        optimizer.zero_grad()
        after()
    return [value.detach().clone() for value in values]


def furthest(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def moved(values):
    return furthest(values, [v.detach() for v in values_of(adapted())])


RATE = 1e-2
OPTIMIZERS = {
    "SGD": lambda v: torch.optim.SGD(v, lr=RATE, momentum=0.9, nesterov=True),
    "AdamW": lambda v: torch.optim.AdamW(v, lr=RATE, foreach=False),
    "AdamW, foreach": lambda v: torch.optim.AdamW(v, lr=RATE, foreach=True),
    "AdamW, fused": lambda v: torch.optim.AdamW(v, lr=RATE, fused=True),
    "AdamW, amsgrad": lambda v: torch.optim.AdamW(v, lr=RATE, amsgrad=True),
    "Adafactor of torch": lambda v: torch.optim.Adafactor(v, lr=RATE, eps=(None, 1.0)),
    "Adafactor of transformers": lambda v: Adafactor(
        v, lr=RATE, scale_parameter=False, relative_step=False
    ),
    "RMSprop": lambda v: torch.optim.RMSprop(v, lr=RATE),
    "Adagrad": lambda v: torch.optim.Adagrad(v, lr=RATE),
    "NAdam": lambda v: torch.optim.NAdam(v, lr=RATE),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_makes_the_plain_steps(name):
    """Gradients differ by rounding, which the steps of these optimizers enlarge to no more."""
    model = adapted()
    before = base_weights(model)
    ours = train(model, OPTIMIZERS[name])
    plain = train(Plain(adapted()), OPTIMIZERS[name])
    assert moved(ours) > 1e-4
    assert furthest(ours, plain) <= 1e-4 * moved(ours)
    assert same_weights(before, base_weights(model))


def test_ways_to_make_one_step_agree():
    """foreach to the bit with a loop, fused up to its rounding."""
    loop, foreach, fused = (
        train(adapted(), OPTIMIZERS[name]) for name in ("AdamW", "AdamW, foreach", "AdamW, fused")
    )
    assert furthest(loop, foreach) == 0
    assert furthest(loop, fused) <= 1e-6


BITSANDBYTES = {  # how far the values may be from those of the float32 optimizer, of their way
    "Adam8bit": ("Adam", 0.1),
    "AdamW8bit": ("AdamW", 0.1),
    "PagedAdamW8bit": ("AdamW", 0.1),
    "PagedAdamW": ("AdamW", 1e-4),
    "PagedAdamW32bit": ("AdamW", 1e-4),
}


@needs_bitsandbytes
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes(name):
    import bitsandbytes

    kind, bound = BITSANDBYTES[name]
    model, states = adapted(), []

    def make(values):
        states.append(getattr(bitsandbytes.optim, name)(values, lr=RATE, weight_decay=0.0))
        return states[-1]

    before = base_weights(model)
    ours = train(model, make)
    exact = train(adapted(), lambda v: getattr(torch.optim, kind)(v, lr=RATE, weight_decay=0.0))
    # of 6225 values in 8 bits, of the other layer's 1556 not: bitsandbytes leaves few as they are
    kept = {state["state1"].dtype for state in states[0].state.values()}
    assert kept == {torch.float32, torch.uint8} if "8bit" in name else {torch.float32}
    assert furthest(ours, exact) <= bound * moved(exact)
    assert furthest(ours, train(Plain(adapted()), make)) <= 1e-3 * moved(exact)
    assert same_weights(before, base_weights(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        *("adamw_torch_fused", "adafactor", "sgd", "rmsprop"),
        pytest.param("adamw_bnb_8bit", marks=needs_bitsandbytes),
        pytest.param("paged_adamw_8bit", marks=needs_bitsandbytes),
    ],
)
def test_optimizers_that_trainer_knows_by_name(name, tmp_path):
    model = get_peft_model(llama(), ShiraConfig(density=0.3, target_modules="all-linear"))
    before = base_weights(model)
    rows = [(torch.arange(16) + start) % 64 for start in range(32)]
    rows = [{"input_ids": row, "labels": row} for row in rows]
    options = {"max_steps": 8, "learning_rate": 3e-2, "per_device_train_batch_size": 16}
    options |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), optim=name, logging_steps=1, **options)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [float(told["loss"]) for told in trainer.state.log_history if "loss" in told]
    assert losses[-1] < losses[0]
    assert same_weights(before, base_weights(model))


def test_muon_trains_matrices_alone():
    """It refuses the values, which are no matrix; whole modules beside them are for it."""
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        train(adapted(), lambda v: torch.optim.Muon(v, lr=RATE))
    model = adapted(modules_to_save=["c"])
    trained = [p for p in model.parameters() if p.requires_grad]
    muon = torch.optim.Muon([p for p in trained if p.ndim == 2], lr=RATE)
    adamw = torch.optim.AdamW([p for p in trained if p.ndim != 2], lr=RATE)
    start = [p.detach().clone() for p in trained]
    for step in range(2):
        loss_of(model, step).backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    assert sorted({p.ndim for p in trained}) == [1, 2]
    assert all(not torch.equal(a, b) for a, b in zip(start, trained, strict=True))


def test_adafactor_that_scales_by_the_parameter_stands_still():
    """Its steps are shares of a parameter, and deltas begin at zero."""
    start = get_peft_model(net(), ShiraConfig(target_modules=["a", "b"], density=0.5))
    for make in (
        lambda v: torch.optim.Adafactor(v, lr=RATE),
        lambda v: Adafactor(v, lr=RATE, scale_parameter=True, relative_step=False),
    ):
        for value in values_of(start):
            nn.init.zeros_(value)
        train(start, make)
        assert 0 < max(float(v.abs().max()) for v in values_of(start)) < 1e-2 * RATE * STEPS


@pytest.mark.parametrize(
    "clip", [lambda v: clip_grad_norm_(v, 1e-2), lambda v: clip_grad_value_(v, 1e-4)]
)
def test_clipping(clip):
    """The norm is that of the entries' gradients, which is that of the dense ones at them."""
    sgd = lambda v: torch.optim.SGD(v, lr=1.0)  # noqa: E731
    ours = train(adapted(), sgd, before=clip)
    assert furthest(ours, train(Plain(adapted()), sgd, before=clip)) <= 1e-4 * moved(ours)
    assert moved(ours) < 0.5 * moved(train(adapted(), sgd))


def test_averages_of_the_values():
    """EMA and SWA of the values alone, and of the whole model, whose base keeps its bits."""
    model, decay = adapted(), 0.7
    before, values = base_weights(model), values_of(model)
    ema = get_ema_multi_avg_fn(decay)
    alone = AveragedModel(nn.ParameterList(values), multi_avg_fn=ema)
    whole, swa = AveragedModel(model, multi_avg_fn=ema), AveragedModel(model)
    seen = []

    def after():
        alone.update_parameters(nn.ParameterList(values))
        whole.update_parameters(model)
        swa.update_parameters(model)
        seen.append([value.detach().clone() for value in values])

    schedule = []

    def make(v):
        optimizer = OPTIMIZERS["AdamW"](v)
        schedule.append(SWALR(optimizer, swa_lr=RATE / 2, anneal_epochs=2))
        return optimizer

    train(model, make, after=after)
    schedule[0].step()
    expected, mean = seen[0], seen[0]
    for count, now in enumerate(seen[1:], start=1):
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, now, strict=True)]
        mean = [a + (b - a) / (count + 1) for a, b in zip(mean, now, strict=True)]
    assert furthest(list(alone.module), expected) <= 1e-6
    for average, wanted in ((whole, expected), (swa, mean)):
        assert furthest(values_of(average.module), wanted) <= 1e-6
        assert same_weights(before, base_weights(average.module))
    with torch.no_grad():
        for value, average in zip(values, alone.module, strict=True):
            value.copy_(average)
    x, _ = data(0)
    torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-6)


def test_a_scaler_of_gradients():
    """float16 autocast: the scaled loss gives the steps of the loss that is not scaled."""

    def run(scaler):
        model = adapted()
        values = values_of(model)
        optimizer = torch.optim.SGD(values, lr=1.0)
        for step in range(STEPS):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, step)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(values, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [value.detach().clone() for value in values]

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert moved(scaled) > 1e-3
    assert furthest(scaled, plain) <= 0.02 * moved(plain)  # rounding of float16


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_whole_step_is_compiled(backend):
    """Forward, backward, clipping and optimizer in one compiled function: the same steps."""
    torch._dynamo.reset()
    model = adapted()
    before = base_weights(model)
    values = values_of(model)
    optimizer = torch.optim.AdamW(values, lr=RATE, foreach=True)

    @torch.compile(backend=backend)
    def step(x, y):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        clip_grad_norm_(values, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for number in range(STEPS):
        step(*data(number))
    found = [value.detach().clone() for value in values]
    clip = lambda v: clip_grad_norm_(v, 1.0)  # noqa: E731
    exact = train(adapted(), OPTIMIZERS["AdamW, foreach"], before=clip)
    assert furthest(found, exact) <= 1e-4 * moved(exact)
    assert same_weights(before, base_weights(model))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        return torch.matmul(x, self.stack)


class TestFactoredAdamW:
    """Against a slow reference in dense matrices."""

    @staticmethod
    def reference(model, gradients, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
        """Values by layer after steps with these gradients, one entry at a time."""
        found = []
        for layer, given in zip(layers(model), gradients, strict=True):
            rows, columns = layer.support("default").coordinates().tolist()
            values = layer.shira_weight["default"].detach().clone()
            m, n = layer.weight_shape
            first, of_row, of_column, mean = torch.zeros(len(values)), [0.0] * m, [0.0] * n, 0.0
            for step, gradient in enumerate(given, start=1):
                first = betas[0] * first + (1 - betas[0]) * gradient
                square = (gradient**2).tolist()
                for moments, at in ((of_row, rows), (of_column, columns)):
                    here = {}
                    for i, value in zip(at, square, strict=True):
                        here.setdefault(i, []).append(value)
                    for i, found_here in here.items():
                        now = sum(found_here) / len(found_here)
                        moments[i] = betas[1] * moments[i] + (1 - betas[1]) * now
                mean = betas[1] * mean + (1 - betas[1]) * sum(square) / len(square)
                second = [
                    of_row[i] * of_column[j] / mean for i, j in zip(rows, columns, strict=True)
                ]
                root = (torch.tensor(second) / (1 - betas[1] ** step)).sqrt() + eps
                values = values - lr * decay * values
                values = values - lr * first / (1 - betas[0] ** step) / root
            found.append(values)
        return found

    @pytest.mark.parametrize("options", [{}, {"decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}])
    def test_it_does_what_the_reference_does(self, options):
        model = adapted()
        torch.manual_seed(0)
        gradients = [torch.randn(4, len(v)) * 10 ** torch.randn(len(v)) for v in values_of(model)]
        expected = self.reference(model, gradients, 0.01, **options)
        if "decay" in options:
            options = {"weight_decay": options["decay"]}
        optimizer = FactoredAdamW(model, lr=0.01, by_weight=False, **options)
        for step in range(4):
            for values, given in zip(values_of(model), gradients, strict=True):
                values.grad = given[step]
            optimizer.step()
        for values, wanted in zip(values_of(model), expected, strict=True):
            torch.testing.assert_close(values.detach(), wanted)

    def test_rates_are_in_proportion_to_the_deviations_of_the_weights(self):
        model = adapted(modules_to_save=["c"])
        a, b = layers(model)
        with torch.no_grad():
            b.get_base_layer().weight.mul_(3)
        optimizer = FactoredAdamW(model, lr=1e-2)
        deviations = [layer.get_base_layer().weight.std(correction=0) for layer in (a, b)]
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[1] / rates[0] == pytest.approx(float(deviations[1] / deviations[0]))
        counts = [len(v) for v in values_of(model)]
        mean = (rates[0] * counts[0] + rates[1] * counts[1]) / sum(counts)
        assert mean == pytest.approx(1e-2)
        assert rates[2] == 1e-2  # modules_to_save
        merged = adapted()
        with torch.no_grad():
            layers(merged)[1].get_base_layer().weight.mul_(3)
        merged.merge_adapter()  # the base's weights count, not what is in them
        assert [g["lr"] for g in FactoredAdamW(merged, lr=1e-2).param_groups] == rates[:2]

    @pytest.mark.parametrize("by_weight", [True, False])
    def test_at_the_default_rate_a_step_is_a_share_of_the_weights_norm(self, by_weight):
        for density in (0.05, 0.4):
            model = adapted(density=density, modules_to_save=["c"])
            weights = [layer.get_base_layer().weight for layer in layers(model)]
            with torch.no_grad():
                weights[1].mul_(3)
            optimizer = FactoredAdamW(model, by_weight=by_weight)
            start = [v.detach().clone() for v in values_of(model)]
            for values in values_of(model):  # of one magnitude: each entry moves by its rate
                values.grad = torch.ones(len(values))
            optimizer.step()
            moved = sum(
                float((a - b).detach().norm() ** 2)
                for a, b in zip(start, values_of(model), strict=True)
            )
            norm = sum(weight.numel() * float(weight.var(correction=0)) for weight in weights)
            assert (moved / norm) ** 0.5 == pytest.approx(RELATIVE_STEP, rel=1e-4)
            assert optimizer.param_groups[-1]["lr"] == 1e-3

    def test_weights_of_zeros_are_trained_too(self):
        model = adapted()
        first, second = (layer.get_base_layer().weight for layer in layers(model))
        with torch.no_grad():
            first.zero_()
        assert all(group["lr"] > 0 for group in FactoredAdamW(model).param_groups)
        with torch.no_grad():
            second.zero_()
        assert [group["lr"] for group in FactoredAdamW(model).param_groups] == [1e-3] * 2

    def test_what_has_no_positions_is_stepped_as_by_adamw(self):
        ours, theirs = (adapted(modules_to_save=["c"]) for _ in range(2))
        one = FactoredAdamW(ours, lr=1e-2, weight_decay=0.1, by_weight=False)
        two = torch.optim.AdamW(
            [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
        )
        for step in range(3):
            torch.manual_seed(step)
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                if p.requires_grad:
                    p.grad = torch.randn_like(p)
                    q.grad = p.grad.clone()
            one.step(), two.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if p.requires_grad and "shira_weight" not in name:
                torch.testing.assert_close(p, q)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_goes_on_from_its_state_to_the_bit(self, tmp_path, dtype):
        def make():
            model = adapted(modules_to_save=["c"])
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
            return model, FactoredAdamW(model, lr=1e-2)

        def steps(model, optimizer, numbers):
            for step in numbers:
                torch.manual_seed(step)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.randn(parameter.shape).to(dtype)
                optimizer.step()

        whole, optimizer = make()
        start = [p.detach().clone() for p in whole.parameters()]
        steps(whole, optimizer, range(4))
        first, optimizer = make()
        steps(first, optimizer, range(2))
        torch.save((first.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
        second, again = make()
        state, of_optimizer = torch.load(tmp_path / "state.pt")
        second.load_state_dict(state)
        again.load_state_dict(of_optimizer)
        steps(second, again, range(2, 4))
        trained = [p.requires_grad for p in whole.parameters()]
        for a, b, before, moved in zip(
            whole.parameters(), second.parameters(), start, trained, strict=True
        ):
            assert torch.equal(a, b)
            assert torch.equal(a, before) != moved
        assert all(
            s["row_sq"].dtype == torch.float32 for s in again.state.values() if "row_sq" in s
        )

    def test_a_trainer_takes_it_with_its_own_schedule(self, tmp_path):
        model = get_peft_model(llama(), ShiraConfig(r=4, random_seed=0))
        before = base_weights(model)
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(64).view(4, 16)]
        options = {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "report_to": [],
            "use_cpu": True,
        }
        options |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
        optimizer = FactoredAdamW(model, lr=3e-2)
        first = [group["lr"] for group in optimizer.param_groups]
        arguments = TrainingArguments(str(tmp_path), **options)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train()
        losses = [float(told["loss"]) for told in trainer.state.log_history if "loss" in told]
        assert losses[-1] < losses[0]
        assert len(set(first)) > 1
        assert all(group["lr"] == 0 for group in optimizer.param_groups)
        assert same_weights(before, base_weights(model))

    def test_few_entries(self):
        model = adapted(target_modules=["a"], density=1 / (32 * 256))
        (values,) = values_of(model)
        assert len(values) == 1
        start = values.detach().clone()
        optimizer = FactoredAdamW(model, lr=0.1)
        for _ in range(2):  # of one entry row, column and mean are the same: AdamW
            values.grad = torch.tensor([3.0])
            optimizer.step()
        torch.testing.assert_close(values.detach(), start - 0.2)
        values.grad = torch.zeros(1)
        optimizer.step()
        assert values.isfinite().all()

    def test_no_entry_at_all(self):
        model = adapted()
        for layer in layers(model):
            layer.shira_weight["default"] = nn.Parameter(torch.zeros(0))
            layer.shira_indices["default"] = torch.zeros(2, 0, dtype=torch.int32)
        optimizer = FactoredAdamW(model)
        for values in values_of(model):
            values.grad = torch.zeros(0)
        optimizer.step()
        assert [len(v) for v in values_of(model)] == [0, 0]

    @pytest.mark.parametrize("kind", ["experts", "convolution", "embedding", "conv1d"])
    def test_every_kind_of_layer_learns(self, kind):
        torch.manual_seed(0)
        if kind == "convolution":
            base, config = nn.Sequential(nn.Conv2d(3, 8, 3)), {"target_modules": ["0"]}
            x = torch.randn(4, 3, 8, 8)
        elif kind == "embedding":
            base, config = nn.Sequential(nn.Embedding(30, 8)), {"target_modules": ["0"]}
            x = torch.arange(30).view(5, 6)
        elif kind == "conv1d":
            base, config = nn.Sequential(Conv1D(8, 12)), {"target_modules": ["0"]}
            x = torch.randn(4, 12)
        else:
            base = nn.Sequential(Experts())
            config = {"target_parameters": ["0.stack"], "target_modules": []}
            x = torch.randn(4, 6)
        model = get_peft_model(base, ShiraConfig(density=0.3, random_seed=0, **config))
        optimizer = FactoredAdamW(model, lr=1e-2)
        (places,) = optimizer._places.values()
        sizes = {
            "experts": (18, 5),
            "convolution": (8, 27),
            "embedding": (30, 8),
            "conv1d": (12, 8),
        }
        assert tuple(map(len, places.counts)) == sizes[kind]
        found = []
        for _ in range(10):
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        assert found == sorted(found, reverse=True)

    def test_the_scale_of_gradients_does_not_matter(self):
        moved = []
        for scale in (1.0, 2.0**-40, 2.0**40):
            model = adapted()
            optimizer = FactoredAdamW(model, lr=1e-2, eps=0.0)
            torch.manual_seed(0)
            for values in values_of(model):
                values.grad = torch.randn(len(values)) * scale
            optimizer.step()
            moved.append([v.detach().clone() for v in values_of(model)])
        for other in moved[1:]:
            for a, b in zip(moved[0], other, strict=True):
                torch.testing.assert_close(a, b)

    def test_what_it_refuses(self):
        model = adapted()
        optimizer = FactoredAdamW(model)
        values, *_ = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = [nn.Parameter(values.detach())]
        with pytest.raises(ConfigError, match="FSDP2"):
            optimizer.step()
        for options in (
            {"lr": -1.0},
            {"betas": (0.9, 1.0)},
            {"eps": math.nan},
            {"weight_decay": -1},
        ):
            with pytest.raises(ConfigError, match=next(iter(options))):
                FactoredAdamW(model, **options)
        for p in model.parameters():
            p.requires_grad_(False)
        with pytest.raises(ConfigError, match="no trainable parameters"):
            FactoredAdamW(model)
