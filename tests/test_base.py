# SPDX-License-Identifier: Apache-2.0
"""Replacement values, fingerprints, and one verdict on the base at every door."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shira.adapter import Adapter
from shira.base import (
    FINGERPRINT_FIELD,
    ROUNDED_FIELD,
    accept,
    accumulation_dtype,
    fingerprint,
    fingerprint_fields,
    judge,
    judge_together,
    replacement,
)
from shira.checkpoints import open_checkpoint
from shira.cli.summary import summarize
from shira.convert import merge, to_patches
from shira.delta import SparseDelta
from shira.errors import WrongBaseError
from shira.fusing import fuse
from shira.support import Support
from shira.switch import Switch

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def test_the_sum_is_rounded_once():
    # 1 + 2^-8 is a tie in bfloat16; the 2^-20 beyond it, lost if the delta were rounded first,
    # decides.
    base, value = torch.ones(1, dtype=torch.bfloat16), torch.tensor([2.0**-8 + 2.0**-20])
    assert replacement(base, value).item() == 1 + 2.0**-7
    assert (base + value.bfloat16()).item() == 1.0


BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0**-24, 1e-40, 65504.0, 3e38, -3e38, math.inf, -math.inf)


@pytest.mark.parametrize("delta_dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_bits_are_those_of_the_rule(device, dtype, delta_dtype):
    """Cast, add, cast: also for any bits that a base may hold, and without gradients in one op."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([*SPECIAL, math.nan])
    any_bits = torch.randint(-(2**62), 2**62, (5000,), generator=generator).view(
        BITS[dtype.itemsize]
    )
    base = torch.cat([special.repeat_interleave(12).to(dtype), any_bits.view(dtype)])
    sizes = 10.0 ** torch.randint(-9, 6, (base.numel(),), generator=generator)
    delta = torch.randn(base.numel(), generator=generator, dtype=F64) * sizes
    delta[:144] = special.repeat(12)
    base, delta = base.to(device), delta.to(device, delta_dtype)
    wide = torch.float64 if F64 in (dtype, delta_dtype) else torch.float32
    want = (base.to(wide) + delta.to(wide)).to(dtype)
    got = replacement(base, delta)
    assert torch.equal(got.view(BITS[dtype.itemsize]), want.view(BITS[dtype.itemsize]))
    with_gradient = replacement(base, delta.requires_grad_())
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient.view(BITS[dtype.itemsize]), got.view(BITS[dtype.itemsize]))


def test_accumulation_dtype():
    assert accumulation_dtype(torch.bfloat16, torch.float16) == torch.float32
    assert accumulation_dtype(torch.float32, torch.float64) == torch.float64


# --- fingerprints -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "float32:3d246f40a736a7cc"),
        (torch.bfloat16, "bfloat16:cc114a6b3d595316"),
        (torch.float16, "float16:55553857f02d5acc"),
        (torch.float64, "float64:cd67521e37554393"),
    ],
)
def test_fingerprint_is_the_same_for_ever(dtype, expected):
    assert fingerprint(torch.tensor([0.0, 1.0, -2.5, 1024.0], dtype=dtype)) == expected


def test_fingerprint_knows_values_order_dtype_and_sign_of_zero():
    values = torch.tensor([0.0, 1.0, 2.0])
    same = torch.tensor([0.0, 9.0, 1.0, 9.0, 2.0])[::2].requires_grad_()
    assert fingerprint(same) == fingerprint(values)
    others = [values.flip(0), values.half(), values[:2], values[:0], -values]
    assert len({fingerprint(v) for v in [values, *others]}) == 6


def test_what_is_recorded_are_the_exact_hash_and_those_of_narrower_copies():
    values = torch.tensor([0.1, 2.0])
    assert fingerprint_fields({}) == {}
    told = fingerprint_fields({"w": values})
    assert told[FINGERPRINT_FIELD] == {"w": fingerprint(values)}
    assert told[ROUNDED_FIELD] == {
        "w": [fingerprint(values.bfloat16()), fingerprint(values.half())]
    }
    told = fingerprint_fields({"w": values.bfloat16()})
    assert told[ROUNDED_FIELD] == {"w": [fingerprint(values.bfloat16().half())]}


# --- the verdict, and the doors that go by it ---------------------------------------------------

# By the dtype of the base that the adapter was made on and that of the base at hand: the verdict
# on a copy of that base and on another one, and both of a file that records the exact hash alone.
# The bases are float32 models, loaded in those dtypes.
SAME, ROUNDED, ANOTHER, UNTOLD = "same", "same after rounding", "another", "cannot be told"
VERDICTS = {
    (F32, F32): (SAME, ANOTHER, SAME, ANOTHER),
    (F32, BF16): (ROUNDED, ANOTHER, UNTOLD, UNTOLD),
    (F32, F16): (ROUNDED, ANOTHER, UNTOLD, UNTOLD),
    (BF16, F32): (ROUNDED, ANOTHER, ROUNDED, ANOTHER),
    (BF16, BF16): (SAME, ANOTHER, SAME, ANOTHER),
    (BF16, F16): (UNTOLD, UNTOLD, UNTOLD, UNTOLD),
    (F16, F32): (ROUNDED, ANOTHER, ROUNDED, ANOTHER),
    (F16, BF16): (UNTOLD, UNTOLD, UNTOLD, UNTOLD),
    (F16, F16): (SAME, ANOTHER, SAME, ANOTHER),
    (F64, F64): (SAME, ANOTHER, SAME, ANOTHER),
    (F64, F32): (SAME, ANOTHER, SAME, UNTOLD),
    (F64, BF16): (ROUNDED, ANOTHER, UNTOLD, UNTOLD),
    (F32, F64): (ROUNDED, ANOTHER, ROUNDED, ANOTHER),
    (BF16, F64): (ROUNDED, ANOTHER, ROUNDED, ANOTHER),
}
CASES = [
    pytest.param(
        *(made_on, loaded, at % 2 == 1, at >= 2, verdict),
        id="-".join(
            [
                str(made_on)[6:],
                "on",
                str(loaded)[6:],
                *(["wrong"] * (at % 2)),
                *(["old"] * (at // 2)),
            ]
        ),
    )
    for (made_on, loaded), verdicts in VERDICTS.items()
    for at, verdict in enumerate(verdicts)
]
SHAPE = (8, 6)  # that of "q" in the cluster of tests/serve


def weights() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def adapter_on(base: torch.Tensor, name: str, *, old: bool = False, zeros: bool = False) -> Adapter:
    support = Support(SHAPE, torch.arange(0, 48, 2))
    values = torch.zeros(24) if zeros else torch.linspace(0.5, 1, 24)
    metadata = fingerprint_fields({name: base.reshape(-1)[::2]})
    if old:
        metadata.pop(ROUNDED_FIELD, None)
    fields = {"r": 1, "target_modules": ["q"], "base_model_name_or_path": "some/model"}
    return Adapter({name: SparseDelta(support, values)}, {**metadata, **fields})


class Model(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.q = nn.Linear(6, 8, bias=False)
        self.q.weight = nn.Parameter(weight.clone())


def by_judge(adapter, base, tmp_path):
    delta = adapter["q.weight"]
    held = base.reshape(-1)[delta.support.indices]
    return judge(adapter.metadata, "q.weight", delta.values, held)


def by_inspect(adapter, base, tmp_path):
    save_file({"q.weight": base}, tmp_path / "base.safetensors")
    adapter.save(tmp_path / "a.safetensors")
    told = summarize(tmp_path / "a.safetensors", open_checkpoint(tmp_path / "base.safetensors"))
    return told.targets[0].base


def by_merge(adapter, base, tmp_path):
    save_file({"q.weight": base}, tmp_path / "base.safetensors")
    told = merge(adapter, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    return told.targets[0].base


def by_patches(adapter, base, tmp_path):
    to_patches(adapter, {"q.weight": base})


def by_switch(adapter, base, tmp_path):
    Switch(Model(base)).load("a", adapter)


def by_tuner(adapter, base, tmp_path):
    from shira import PeftModel

    adapter.save(tmp_path / "peft", format="peft")
    PeftModel.from_pretrained(Model(base), tmp_path / "peft", torch_device="cpu")


def by_server(adapter, base, tmp_path):
    from tests.serve.test_worker import Cluster

    cluster = Cluster(1, base.dtype)
    cluster.base["q"] = base
    cluster.held[0].model.load_weights(cluster.base.items())
    metadata = {
        field: {"q": told["q.weight"]} if isinstance(told, dict) else told
        for field, told in adapter.metadata.items()
    }
    try:
        (loaded,) = cluster.load("a", Adapter({"q": adapter["q.weight"]}, metadata))
    finally:
        cluster.pool.shutdown()
    return bool(loaded.checked)


TELLING = [by_judge, by_inspect, by_merge]  # what they return is the verdict
WARNING = [by_patches, by_switch, by_tuner]
DOORS = [*TELLING, *WARNING, by_server]


def outcome(door, adapter, base, tmp_path):
    """Return a door's answer, and whether it warned of the base."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = door(adapter, base, tmp_path)
    return found, any("cannot be told" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("made_on", "loaded", "wrong", "old", "verdict"), CASES)
def test_all_doors_agree(made_on, loaded, wrong, old, verdict, tmp_path):
    whole = weights()
    adapter = adapter_on(whole.to(made_on), "q.weight", old=old)
    base = (whole + 0.25 if wrong else whole).to(loaded)
    assert by_judge(adapter, base, tmp_path) == verdict
    for door in DOORS[1:]:
        folder = tmp_path / door.__name__
        folder.mkdir()
        if verdict == "another" and door is not by_inspect:
            with pytest.raises(WrongBaseError, match="wrong base"):
                door(adapter, base, folder)
            continue
        found, warned = outcome(door, adapter, base, folder)
        assert warned == (verdict == "cannot be told" and door in WARNING), door
        if door in TELLING:
            assert found == verdict, door
        elif door is by_server:
            assert found == verdict.startswith("same")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_deltas_of_zeros_fit_every_base(door, tmp_path):
    adapter = adapter_on(weights(), "q.weight", zeros=True)
    found, warned = outcome(door, adapter, weights() + 1, tmp_path)
    assert not warned
    if door in TELLING:
        assert found == "untrained"


def test_zeros_on_the_right_base_are_found_to_be(tmp_path):
    adapter = adapter_on(weights(), "q.weight", zeros=True)
    assert by_judge(adapter, weights(), tmp_path) == "same"


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_an_adapter_that_does_not_record_its_base(door, tmp_path):
    adapter = adapter_on(weights(), "q.weight")
    del adapter.metadata[FINGERPRINT_FIELD]  # what is left tells nothing without it
    found, warned = outcome(door, adapter, weights() + 1, tmp_path)
    assert not warned
    if door in TELLING:
        assert found == "not recorded"


def test_a_float16_copy_of_a_bfloat16_base_is_known_where_float16_loses():
    small = torch.tensor([0.1, 3e-7]).bfloat16()
    assert not torch.equal(small.half().bfloat16(), small)
    recorded = fingerprint_fields({"w": small})
    assert judge(recorded, "w", small, small.half()) == "same after rounding"


def test_a_float64_base_is_rounded_as_its_copies_are():
    """From float64 torch rounds to float32 first; a model that was loaded so is the same."""
    tie = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=F64)
    for made_on in (tie.bfloat16(), tie.float().bfloat16(), tie.half(), tie.float().half()):
        assert judge(fingerprint_fields({"w": made_on}), "w", tie, tie) == "same after rounding"


@pytest.mark.parametrize(("made_on", "other", "wrong", "old", "verdict"), CASES)
def test_two_adapters_with_the_same_entries(made_on, other, wrong, old, verdict):
    """Known is what they record: of the wider one its narrower copies, if it is not old."""
    one = adapter_on(weights().to(made_on), "w", old=old)
    whole = weights() + 0.25 if wrong else weights()
    two = adapter_on(whole.to(other), "w", old=old)
    found = judge_together(one.metadata, two.metadata, "w")
    if not old:  # that the wider one is exactly the narrower, its own values alone can tell
        assert found == (ROUNDED if (made_on, other, verdict) == (F64, F32, SAME) else verdict)
    if found == "another":
        with pytest.raises(WrongBaseError, match="different base models"):
            fuse([one, two])
    else:
        fuse([one, two])


@pytest.mark.parametrize("text", ["float8_e4m3fn:" + "0" * 16, "int8:" + "0" * 16, "x:" + "0" * 16])
def test_a_dtype_that_cannot_be_compared(text):
    metadata = {FINGERPRINT_FIELD: {"w": text}}
    assert judge(metadata, "w", torch.ones(1), torch.ones(1)) == "cannot be told"
    assert judge(metadata, "w", torch.ones(1), None) == "cannot be told"


@pytest.mark.parametrize("told", ["float32:0", [1], {"w": None}, {"v": "float32:0"}])
def test_metadata_that_records_nothing_of_the_parameter(told):
    for metadata in ({FINGERPRINT_FIELD: told}, {FINGERPRINT_FIELD: told, ROUNDED_FIELD: told}):
        assert judge(metadata, "w", torch.ones(1), torch.ones(1)) == "not recorded"
        assert judge_together(metadata, metadata, "w") == "not recorded"
    odd = {FINGERPRINT_FIELD: {"w": 4}, ROUNDED_FIELD: {"w": 4}}
    assert judge(odd, "w", torch.ones(1), torch.ones(1)) == "cannot be told"


def test_the_error_names_what_and_the_way_out():
    metadata = {**fingerprint_fields({"w": torch.ones(1)}), "base_model_name_or_path": "some/model"}
    with pytest.raises(WrongBaseError) as caught:
        accept(metadata, {"v": "same", "w": "another"}, "there", "say so")
    for part in ("there: wrong base: 'w'", "1 of 2 weights", "'some/model'", "same: say so"):
        assert part in str(caught.value)


def test_a_caller_may_insist(tmp_path):
    adapter, other = adapter_on(weights(), "q.weight"), weights() + 1
    Switch(Model(other)).load("a", adapter, check_base=False)
    assert len(to_patches(adapter, {"q.weight": other}, check_base=False)) == 1
    save_file({"q.weight": other}, tmp_path / "base.safetensors")
    told = merge(adapter, tmp_path / "base.safetensors", tmp_path / "out", check_base=False)
    assert told.targets[0].base == "another"


def test_tied_weights_are_held_against_the_name_that_the_adapter_has():
    """The first name of the memory is not the adapter's, and has no fingerprint."""
    model = nn.ModuleDict({"a": Model(weights()).q, "b": Model(weights()).q})
    model["b"].weight = model["a"].weight
    adapter = adapter_on(weights() + 1, "b.weight")
    with pytest.raises(WrongBaseError, match=r"'b\.weight'"):
        Switch(model).load("x", adapter, allow_tied=True)


def test_files_keep_both_fields(tmp_path: Path):
    adapter = adapter_on(weights(), "q.weight")
    for path, form in ((tmp_path / "a.safetensors", "compact"), (tmp_path / "a", "peft")):
        adapter.save(path, format=form)
        told = Adapter.load(path).metadata
        for field in (FINGERPRINT_FIELD, ROUNDED_FIELD):
            assert told[field] == adapter.metadata[field]


def test_a_trained_adapter_is_known_on_a_narrower_copy(tmp_path):
    from shira import PeftModel, ShiraConfig, get_peft_model

    config = ShiraConfig(r=1, target_modules=["q"], random_seed=0)
    model = get_peft_model(Model(weights()), config)
    with torch.no_grad():
        model.base_model.model.q.shira_weight["default"].fill_(0.5)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(Model(weights().bfloat16()), tmp_path, torch_device="cpu")
    with pytest.raises(WrongBaseError):
        PeftModel.from_pretrained(Model((weights() + 1).bfloat16()), tmp_path, torch_device="cpu")
