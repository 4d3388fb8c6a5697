# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect

import pytest
import torch

from shira.errors import ConfigError, MaskError
from shira.masks import (
    MASKS,
    block_diagonal_support,
    block_support,
    choose,
    grad_support,
    magnitude_support,
    random_support,
    snip_support,
    struct_support,
)

WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
GRADIENT = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MASKS)
def test_the_table_says_what_the_functions_take(name):
    spec = MASKS[name]
    parameters = set(inspect.signature(spec.select).parameters)
    assert spec.name == name
    assert spec.source
    needs = spec.needs
    if "score" in spec.options:  # then it depends
        needs = needs.union(*(spec.needs_with({"score": score}) for score in MASKS))
    assert needs == parameters & {"weight", "gradient"}
    assert set(spec.options) == parameters - {"shape", "k", "weight", "gradient", "seed", "name"}
    with pytest.raises(AttributeError):
        spec.name = "other"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("k", [0, 1, 14, 48])
def test_every_mask_has_exactly_k_sorted_unique_entries(name, k):
    def run():
        return choose(name, (6, 8), k, weight=WEIGHT, gradient=GRADIENT, seed=0, name="w")

    support = run()
    entries = support.indices.tolist()
    assert len(entries) == k
    assert entries == sorted(set(entries))
    assert all(0 <= entry < 48 for entry in entries)
    assert support.shape == (6, 8)
    assert support == run()


def test_arguments_and_options_arrive():
    shape, k = (6, 8), 14
    given = {"weight": WEIGHT, "gradient": GRADIENT, "seed": 5, "name": "w"}
    for slot in (0, 2):
        expected = random_support(shape, k, seed=5, name="w", slot=slot)
        assert choose("random", shape, k, slot=slot, **given) == expected
    assert choose("struct", shape, k, axis="column", offset=1, **given) == struct_support(
        shape, k, axis="column", offset=1
    )
    assert choose("magnitude", shape, k, largest=False, **given) == magnitude_support(
        WEIGHT, k, largest=False
    )
    assert choose("grad", shape, k, **given) == grad_support(GRADIENT, k)
    assert choose("snip", shape, k, **given) == snip_support(WEIGHT, GRADIENT, k)
    assert choose("block", shape, k, block_size=2, **given) == block_support(
        shape, k, block_size=2, seed=5, name="w"
    )
    assert choose("block", shape, k, block_size=2, score="snip", **given) == block_support(
        shape, k, block_size=2, score="snip", weight=WEIGHT, gradient=GRADIENT
    )
    assert choose("block_diagonal", shape, k, block_size=2, **given) == block_diagonal_support(
        shape, k, block_size=2
    )


def test_what_a_mask_needs_depends_on_its_options():
    block = MASKS["block"]
    assert block.needs_with(None) == block.needs_with({"block_size": 8}) == frozenset()
    assert block.needs_with({"score": "random"}) == frozenset()
    assert block.needs_with({"score": "magnitude"}) == {"weight"}
    assert block.needs_with({"score": "grad"}) == {"gradient"}
    assert block.needs_with({"score": "snip"}) == {"weight", "gradient"}
    assert block.needs_with({"score": ["x"]}) == frozenset()  # refused elsewhere
    assert MASKS["snip"].needs_with({"score": "random"}) == {"weight", "gradient"}


@pytest.mark.parametrize(
    ("mask_type", "message"),
    [
        ("magnitud", "'magnitud'; known are 'random', .* Did you mean 'magnitude'"),
        ("xyz", "unknown mask_type 'xyz'"),
        (None, "unknown mask_type None"),
        (["random"], "unknown mask_type"),
    ],
)
def test_unknown_kind(mask_type, message):
    with pytest.raises(ConfigError, match=message):
        choose(mask_type, (6, 8), 3, seed=0)


@pytest.mark.parametrize(
    ("mask_type", "options", "message"),
    [
        ("magnitude", {"largst": False}, "no option 'largst'.* Did you mean 'largest'"),
        ("random", {"axis": "row"}, "'random' has no option 'axis'; it takes slot"),
        ("grad", {"largest": True}, "it takes no options"),
        ("struct", {"slot": 1}, "'struct' has no option 'slot'"),
    ],
)
def test_unknown_option(mask_type, options, message):
    with pytest.raises(ConfigError, match=message):
        choose(mask_type, (6, 8), 3, weight=WEIGHT, gradient=GRADIENT, seed=0, **options)


@pytest.mark.parametrize(
    ("mask_type", "options", "message"),
    [
        ("random", {"slott": 1}, "no option 'slott'.* Did you mean 'slot'"),
        ("block", {"block_size": 0}, "'block': block_size is a positive integer, not 0"),
        ("block", {"score": "snipp"}, "score is one of .* Did you mean 'snip'"),
        ("block_diagonal", {"block_size": True}, "positive integer, not True"),
    ],
)
def test_options_are_checked_without_a_weight(mask_type, options, message):
    with pytest.raises(ConfigError, match=message):
        MASKS[mask_type].check(options)
    MASKS[mask_type].check({})


def test_what_is_missing():
    for mask_type in ("grad", "snip"):
        with pytest.raises(MaskError, match=r"layer.w: .*gradient.*shira.calibrate") as caught:
            choose(mask_type, (6, 8), 3, weight=WEIGHT, name="layer.w")
        assert mask_type in str(caught.value)
        with pytest.raises(MaskError, match=r"layer.w: .*gradient.*shira.calibrate"):
            choose("block", (6, 8), 3, weight=WEIGHT, name="layer.w", score=mask_type)
    with pytest.raises(MaskError, match="needs the weight, but none was passed"):
        choose("magnitude", (6, 8), 3)
    with pytest.raises(ConfigError, match="w: mask_type 'block' needs a seed"):
        choose("block", (6, 8), 3, name="w")
    with pytest.raises(ConfigError, match="w: mask_type 'random' needs a seed"):
        choose("random", (6, 8), 3, name="w")


def test_shapes_that_disagree():
    with pytest.raises(MaskError, match=r"w: the gradient has shape \(8, 6\), the mask \(6, 8\)"):
        choose("grad", (6, 8), 3, gradient=GRADIENT.t(), name="w")


@pytest.mark.parametrize("name", MASKS)
def test_errors_name_the_parameter(name):
    with pytest.raises(MaskError, match=r"^layer\.w: .*49 entries"):
        choose(name, (6, 8), 49, weight=WEIGHT, gradient=GRADIENT, seed=0, name="layer.w")


@pytest.mark.parametrize("kind", sorted(MASKS))
def test_each_matrix_of_a_stack_has_a_mask_of_its_own(kind):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(3, 16, 8, generator=generator) for _ in range(2))
    given = {"weight": weight, "gradient": gradient, "seed": 1, "name": "experts"}
    together = choose(kind, (3, 16, 8), 3 * 24, matrices=3, **given)
    assert together.shape == (3, 16, 8)
    for at in range(3):
        own = {**given, "weight": weight[at], "gradient": gradient[at], "name": f"experts.{at}"}
        alone = choose(kind, (16, 8), 24, **own).indices.long()
        mine = together.indices.long()
        mine = mine[mine // 128 == at] % 128
        assert torch.equal(mine, alone)


def test_entries_are_shared_out_evenly_or_refused():
    with pytest.raises(MaskError, match="cannot be shared out evenly among the 3 matrices"):
        choose("random", (3, 16, 8), 25, matrices=3, seed=0, name="experts")
    with pytest.raises(MaskError, match="the weight has shape"):
        choose("magnitude", (3, 16, 8), 24, matrices=3, weight=torch.randn(3, 4))
