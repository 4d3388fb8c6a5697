# SPDX-License-Identifier: Apache-2.0
"""Training as people do it: checkpointing, accumulation, autocast, odd optimizers, compile, TRL."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shira import ShiraConfig, get_peft_model

from .models import EVERYTHING, base_weights, everything, llama, mlp, randomize, same_weights
from .stock import fixed_mask

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def adapted_llama(**options):
    config = ShiraConfig(r=2, target_modules=ALL, random_seed=0)
    model = get_peft_model(llama(**options), config)
    randomize(model, scale=0.1)
    return model.train()


def ids():
    return torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(model):
    model(input_ids=ids(), labels=ids()).loss.backward()
    got = gradients(model)
    model.zero_grad()
    return got


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert len(want) == 14
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    want = one_step(adapted_llama())
    model = adapted_llama()
    before = base_weights(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.base_model.model.enable_input_require_grads()
    assert_same(one_step(model), want)
    assert same_weights(base_weights(model), before)


def test_checkpointing_of_one_layer():
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1"], random_seed=0))
    randomize(model)
    layer = model.base_model.model.lin1
    x = torch.randn(3, 12, requires_grad=True)
    want = torch.autograd.grad(layer(x).square().sum(), [x, layer.shira_weight["default"]])
    for reentrant in (False, True):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, want[0])
        torch.testing.assert_close(layer.shira_weight["default"].grad, want[1])
        x.grad = layer.shira_weight["default"].grad = None


def test_gradient_accumulation():
    model = adapted_llama()
    model(input_ids=ids()[:1], labels=ids()[:1]).loss.div(2).backward()
    model(input_ids=ids()[1:], labels=ids()[1:]).loss.div(2).backward()
    assert_same(gradients(model), one_step(adapted_llama()))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base):
    """What is multiplied under autocast is the merged weight, cast."""
    model = get_peft_model(mlp(dtype=base), ShiraConfig(r=2, target_modules=["lin1", "lin2"]))
    randomize(model)
    merged = copy.deepcopy(model).merge_and_unload()
    before = base_weights(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = model(X.to(base)), merged(X.to(base))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert same_weights(base_weights(model), before)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_dtype_of_the_adapter(autocast_adapter_dtype):
    model = get_peft_model(
        mlp(dtype=torch.bfloat16),
        ShiraConfig(r=2, target_modules=["lin1"]),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    want = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    weights = model.base_model.model.lin1.shira_weight["default"]
    assert weights.dtype == want
    model(X.bfloat16()).sum().backward()
    assert weights.grad.dtype == want
    assert model.base_model.model.lin1.shira_indices["default"].dtype == torch.int32


def test_an_input_of_another_dtype_is_an_error_as_in_torch():
    model = get_peft_model(mlp(dtype=torch.bfloat16), ShiraConfig(r=2, target_modules=["lin1"]))
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        model.base_model.model.lin1(torch.randn(2, 12))
    config = ShiraConfig(density=0.2, target_modules=["conv"])
    model = get_peft_model(everything(dtype=torch.bfloat16), config)
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        model.base_model.model.conv(torch.randn(1, 1, 4, 8))


def test_values_are_read_at_each_use():
    """Fused optimizers, .data writes and EMA swaps change values without a version bump."""
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1"]))
    layer = model.base_model.model.lin1
    values = layer.shira_weight["default"]
    optimizer = torch.optim.AdamW([values], lr=0.1, fused=True)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        want = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(model(X), want(X))
    swapped = torch.randn_like(values)
    values.data = swapped
    assert torch.equal(model(X), copy.deepcopy(model).merge_and_unload()(X))
    values.data.copy_(swapped * 2)
    assert torch.equal(model(X), copy.deepcopy(model).merge_and_unload()(X))


def test_policy_and_reference_graphs_alive_at_once():
    """The step of DPO: with the adapter, without it, then backward through both."""
    model = adapted_llama()
    before = base_weights(model)
    policy = model(input_ids=ids()).logits.log_softmax(-1)
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=ids()).logits.log_softmax(-1)
    loss = -torch.nn.functional.logsigmoid((policy - reference).sum(-1)).mean()
    loss.backward()
    got = gradients(model)

    again = adapted_llama()
    policy = again(input_ids=ids()).logits.log_softmax(-1)
    (-torch.nn.functional.logsigmoid((policy - reference).sum(-1)).mean()).backward()
    assert_same(got, gradients(again))
    assert same_weights(base_weights(model), before)


@pytest.mark.parametrize("train", [True, False])
def test_compiled_models_do_not_break(train):
    import torch._dynamo

    torch._dynamo.reset()
    model = get_peft_model(everything(), ShiraConfig(density=0.2, target_modules=EVERYTHING[1:]))
    randomize(model)
    before = base_weights(model)
    tokens = torch.randint(11, (2, 4))
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(tokens), model(tokens))
        if train:
            compiled(tokens).square().sum().backward()
            got = gradients(model)
            model.zero_grad()
            model(tokens).square().sum().backward()
            for name, want in gradients(model).items():
                torch.testing.assert_close(got[name], want)
            values = model.base_model.model.lin.shira_weight["default"]
            values.data.mul_(2)
            torch.testing.assert_close(compiled(tokens), model(tokens))
    assert same_weights(base_weights(model), before)


@pytest.mark.slow
def test_compiled_by_inductor():
    import torch._dynamo

    torch._dynamo.reset()
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1", "lin2"]))
    randomize(model)
    compiled = torch.compile(model.base_model.model, fullgraph=True)
    compiled(X).square().sum().backward()
    got = gradients(model)
    model.zero_grad()
    model(X).square().sum().backward()
    for name, want in gradients(model).items():
        torch.testing.assert_close(got[name], want)


def test_memory_of_a_step_follows_k():
    """Beyond the frozen model: values, positions and saved inputs; no copy of a weight."""
    size, k = 256, 2 * 512
    layers = [nn.Linear(size, size, bias=False) for _ in range(4)]
    config = ShiraConfig(r=2, target_modules=[str(i) for i in range(4)])
    model = get_peft_model(nn.Sequential(*layers), config)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    bases = {layer.weight.data_ptr() for layer in layers}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.randn(3, size))
    own = [t for t in saved if t.data_ptr() not in bases]
    assert max(t.numel() for t in own) <= max(2 * k, 3 * size)


def trainer_arguments(path, **options):
    return {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **options,
    }


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_saves_and_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 9))]

    def run(resume=None):
        torch.manual_seed(0)
        model = adapted_llama()
        before = base_weights(model)
        arguments = TrainingArguments(**trainer_arguments(tmp_path, seed=0))
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        assert same_weights(base_weights(model), before)
        return {n: p.detach().clone() for n, p in model.named_parameters() if "shira" in n}

    whole, resumed = run(), run(str(tmp_path / "checkpoint-2"))
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_dpo(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    data = Dataset.from_dict(
        {"prompt": ["abc", "xyz"] * 4, "chosen": ["def", "abc"] * 4, "rejected": ["zzz", "qq"] * 4}
    )
    model = llama()
    before = base_weights(model)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**trainer_arguments(tmp_path, save_strategy="no")),
        train_dataset=data,
        processing_class=fast,
        peft_config=ShiraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = base_weights(trainer.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_frozen_adapter_keeps_no_input():
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1"]))
    layer = model.base_model.model.lin1
    layer.requires_grad_(False)
    x = torch.randn(50, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not any(t.data_ptr() == x.data_ptr() and t.numel() for t in saved)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:mask_type")
def test_custom_mask_on_a_model_in_bf16():
    config = ShiraConfig(r=1, target_modules=["lin1"], mask_type="fixed")
    config.mask_fn = fixed_mask
    model = get_peft_model(mlp(dtype=torch.bfloat16), config)
    model(X.bfloat16()).sum().backward()
    assert model.base_model.model.lin1.shira_weight["default"].grad.abs().sum() > 0


def test_a_frozen_adapter_compiles():
    import torch._dynamo

    torch._dynamo.reset()
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1"]))
    randomize(model)
    model.requires_grad_(False)
    x = X.clone().requires_grad_()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(model(x).square().sum(), x)[0])
