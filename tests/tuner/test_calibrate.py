# SPDX-License-Identifier: Apache-2.0
"""Masks chosen from gradients: the right entries, bounded memory, and a model left as it was."""

from __future__ import annotations

import copy
from collections import UserDict, defaultdict

import pytest
import torch

from shira import PeftModel, ShiraConfig, calibrate, get_peft_model
from shira.errors import ConfigError, MaskError, TargetError
from shira.support import Support

from .models import EVERYTHING, base_weights, everything, llama, mlp, same_weights

BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def loss_fn(model, batch):
    return model(batch).square().mean()


def config(**options):
    return ShiraConfig(
        **{"r": 1, "mask_type": "grad", "target_modules": ["lin1", "lin2"], **options}
    )


def dense_scores(model, name):
    """Sum over the batches of |gradient|, by plain autograd."""
    weight = dict(model.named_parameters())[name]
    return sum(torch.autograd.grad(loss_fn(model, b), weight)[0].abs() for b in BATCHES)


def top(score, k):
    order = score.flatten().argsort(descending=True, stable=True)
    return Support.from_unsorted(score.shape, order[:k])


@pytest.mark.parametrize("mask_type", ["grad", "snip"])
@pytest.mark.parametrize("group_size", [None, 1])
def test_the_largest_scores_are_chosen(mask_type, group_size):
    model = mlp()
    chosen = calibrate(
        model, config(mask_type=mask_type), BATCHES, loss_fn=loss_fn, group_size=group_size
    )
    adapted = get_peft_model(copy.deepcopy(model), chosen).base_model.model
    for name in ("lin1", "lin2"):
        score = dense_scores(model, f"{name}.weight")
        if mask_type == "snip":
            score = score * getattr(model, name).weight.abs()
        support = getattr(adapted, name).support("default")
        assert support == top(score.detach(), sum(score.shape))


def test_every_kind_of_layer_and_density():
    model = everything()
    batches = [torch.randint(11, (2, 4)) for _ in range(2)]
    chosen = calibrate(
        model,
        config(target_modules=EVERYTHING, density=0.2),
        batches,
        loss_fn=loss_fn,
    )
    adapted = get_peft_model(model, chosen)
    assert adapted(batches[0]).shape == (2, 4, 5)
    conv = adapted.base_model.model.conv
    assert conv.support("default").nnz == round(0.2 * conv.weight.numel())


def test_an_embedding_with_sparse_gradients():
    rows = [torch.randint(11, (2, 4)) for _ in range(2)]
    chosen = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(11, 8, sparse=sparse)
        model = torch.nn.ModuleDict({"emb": table})
        calibrated = calibrate(
            model,
            config(target_modules=["emb"]),
            rows,
            loss_fn=lambda model, batch: model["emb"](batch).square().mean(),
        )
        chosen.append(get_peft_model(model, calibrated).base_model.model["emb"].support("default"))
    assert chosen[0] == chosen[1]


def test_the_models_own_loss_and_saving(tmp_path):
    model = llama()
    rows = torch.randint(64, (2, 9))
    batches = [{"input_ids": rows, "labels": rows}]
    chosen = calibrate(model, config(target_modules=["q_proj"], mask_type="snip"), iter(batches))
    adapted = get_peft_model(model, chosen)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert again.peft_config["default"].mask_type == "snip"
    one = adapted.base_model.model.model.layers[1].self_attn.q_proj.support("default")
    assert again.base_model.model.model.layers[1].self_attn.q_proj.support("default") == one


def test_batches_are_taken_from_any_mapping_and_left_as_they_are():
    class Rows(UserDict):
        def to(self, *_, **__):
            raise AssertionError("the batch itself is moved")

    given = {"x": BATCHES[0]}
    chosen = [
        calibrate(mlp(), config(), [batch], loss_fn=lambda model, b: loss_fn(model, b["x"]))
        for batch in (given, defaultdict(list, given), Rows(given))
    ]
    assert all(one.mask_fn.supports == chosen[0].mask_fn.supports for one in chosen)


def test_the_model_is_left_as_it_was():
    model = everything().train()
    model.lin.eval()
    model.emb.weight.requires_grad_(False)
    model.lin.weight.grad = torch.ones_like(model.lin.weight)
    before = base_weights(model)

    def explode(model, batch):
        raise RuntimeError("no loss today")

    calibrate(
        model, config(target_modules=["lin", "emb"]), [torch.ones(1, 3).long()], loss_fn=loss_fn
    )
    with pytest.raises(RuntimeError, match="no loss"):
        calibrate(model, config(target_modules=["lin", "emb"]), BATCHES, loss_fn=explode)
    assert same_weights(base_weights(model), before)
    assert model.training
    assert not model.lin.training
    assert not model.emb.weight.requires_grad
    assert model.conv.weight.requires_grad
    assert torch.equal(model.lin.weight.grad, torch.ones_like(model.lin.weight))
    assert model.conv.weight.grad is None
    assert not model.lin.weight._post_accumulate_grad_hooks


def test_one_dense_buffer_at_a_time_in_groups():
    """While one layer is scored no other has a gradient or a buffer."""
    model = mlp()
    requiring = []

    def watching(model, batch):
        requiring.append([n for n, p in model.named_parameters() if p.requires_grad])
        assert all(p.grad is None for p in model.parameters())
        return loss_fn(model, batch)

    calibrate(model, config(), BATCHES, loss_fn=watching, group_size=1)
    assert requiring == [["lin1.weight"]] * 3 + [["lin2.weight"]] * 3


def test_the_given_configuration_is_not_changed():
    given = config()
    before = copy.deepcopy(given.to_dict())
    chosen = calibrate(mlp(), given, BATCHES, loss_fn=loss_fn)
    assert given.to_dict() == before
    assert chosen is not given
    with pytest.raises(MaskError, match="calibrate"):
        get_peft_model(mlp(), given)


def test_deterministic():
    one, two = (calibrate(mlp(), config(), BATCHES, loss_fn=loss_fn) for _ in range(2))
    assert one.mask_fn.supports == two.mask_fn.supports


@pytest.mark.parametrize(
    ("options", "batches", "error", "word"),
    [
        ({"mask_type": "random"}, BATCHES, ConfigError, "grad, snip"),
        ({"target_modules": ["lin7"]}, BATCHES, TargetError, "Did you mean"),
        ({"r": 50}, BATCHES, MaskError, "lin1.weight"),
        ({}, [], ConfigError, "no batches"),
        ({}, [torch.full((1, 8), float("nan"))], MaskError, "not finite"),
    ],
)
def test_errors(options, batches, error, word):
    with pytest.raises(error, match=word):
        calibrate(mlp(), config(**options), batches, loss_fn=loss_fn)


def test_more_errors():
    with pytest.raises(ConfigError, match="loss_fn"):
        calibrate(mlp(), config(), BATCHES)
    with pytest.raises(ConfigError, match="iterator"):
        calibrate(mlp(), config(), iter(BATCHES), loss_fn=loss_fn, group_size=1)
    with pytest.raises(ConfigError, match="group_size"):
        calibrate(mlp(), config(), BATCHES, loss_fn=loss_fn, group_size=0)
    chosen = calibrate(mlp(), config(target_modules=["lin1"]), BATCHES, loss_fn=loss_fn)
    chosen.target_modules = ["lin2"]
    with pytest.raises(MaskError, match=r"lin2\.weight"):
        get_peft_model(mlp(), chosen)


@pytest.mark.parametrize("score", ["grad", "snip"])
def test_blocks_chosen_on_data(tmp_path, score):
    from shira.masks import block_support

    model = mlp()
    given = config(mask_type="block", mask_options={"score": score, "block_size": 4})
    with pytest.raises(MaskError, match=r"shira\.calibrate"):
        get_peft_model(mlp(), given)
    chosen = calibrate(model, given, BATCHES, loss_fn=loss_fn)
    adapted = get_peft_model(copy.deepcopy(model), chosen)
    for name in ("lin1", "lin2"):
        scores = dense_scores(model, f"{name}.weight").detach()
        weight = getattr(model, name).weight
        expected = block_support(
            weight.shape,
            sum(weight.shape),
            score=score,
            block_size=4,
            weight=weight,
            gradient=scores,
        )
        assert getattr(adapted.base_model.model, name).support("default") == expected
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path)
    assert again.peft_config["default"].mask_options == {"score": score, "block_size": 4}
    one = adapted.base_model.model.lin1.support("default")
    assert again.base_model.model.lin1.support("default") == one


def test_blocks_that_need_no_data_need_no_calibration():
    for options in (None, {"score": "magnitude"}):
        with pytest.raises(ConfigError, match=r"mask_options=\{'score': 'grad'\}"):
            calibrate(
                mlp(),
                config(mask_type="block", mask_options=options),
                BATCHES,
                loss_fn=loss_fn,
            )
