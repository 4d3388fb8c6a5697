# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shira.adapter import Adapter
from shira.base import fingerprint
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, FileFormatError, WrongBaseError
from shira.store import read_peft, save, to_adapter, validate_against, write_peft
from shira.support import Support
from tests.hostile import peft_files as hostile

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def delta(shape: tuple[int, ...], indices: list[int], dtype: torch.dtype = torch.float32) -> Any:
    values = torch.arange(1, len(indices) + 1).to(dtype) / 4
    return SparseDelta(Support(shape, torch.tensor(indices, dtype=torch.int64)), values)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Up to four weights of one to four dimensions, any number of entries in each, even none."""
    names = draw(st.lists(st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True),
                          unique=True, max_size=4))  # fmt: skip
    deltas = {}
    for name in names:
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
        chosen = draw(st.sets(st.integers(0, math.prod(shape) - 1), max_size=30))
        bits = draw(st.integers(0, 2**31))
        values = torch.randn(len(chosen), generator=torch.Generator().manual_seed(bits))
        indices = torch.tensor(sorted(chosen), dtype=torch.int64)
        dtype = draw(st.sampled_from(DTYPES))
        deltas[f"{name}.weight"] = SparseDelta(Support(shape, indices), values.to(dtype))
    return Adapter(deltas)


@settings(max_examples=60, deadline=None)
@given(adapters(), st.sampled_from([None, torch.int16, torch.int32, torch.int64]))
def test_round_trip_is_bit_for_bit(adapter: Adapter, indices_dtype: torch.dtype | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_peft(adapter, folder, indices_dtype=indices_dtype)
        read = to_adapter(read_peft(folder))
        assert read == adapter
        assert {n: d.support.shape for n, d in read.items()} == {
            n: d.support.shape for n, d in adapter.items()
        }


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_stored_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = Adapter({"a.weight": delta((4, 5), [0, 7, 19])})
    adapter.save(tmp_path, "peft", dtype)
    read = Adapter.load(tmp_path)["a.weight"]
    assert read.values.dtype == dtype
    assert read.values.tolist() == [0.25, 0.5, 0.75]
    assert adapter["a.weight"].values.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2**15, 4), torch.int16), ((2**15 + 1, 4), torch.int32), ((3, 2**14, 3), torch.int32)],
)
def test_indices_take_two_bytes_where_they_fit(
    tmp_path: Path, shape: tuple[int, ...], expected: torch.dtype
) -> None:
    last = math.prod(shape) - 1
    adapter = Adapter({"a.weight": delta(shape, [0, last])})
    adapter.save(tmp_path, "peft")
    stored = load_file(tmp_path / hostile.WEIGHTS)["base_model.model.a.shira_indices"]
    assert stored.dtype == expected
    assert Adapter.load(tmp_path) == adapter


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    """Golden: what stock PEFT would see, tensor by tensor."""
    write_peft(
        Adapter({"m.up.weight": delta((2, 3, 1, 2), [1, 11])}), tmp_path, indices_dtype=torch.int32
    )
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        "base_model.model.m.up.shira_weight": [0.25, 0.5],
        "base_model.model.m.up.shira_indices": [[0, 1], [1, 5]],
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        "r": 1,
        "target_modules": ["m.up"],
        "shira_shapes": {"m.up.weight": [2, 3, 1, 2]},
    }


@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32"],
)
def test_indices_of_any_integer_dtype_and_whole_floats(tmp_path: Path, dtype: str) -> None:
    hostile.write_sound(tmp_path)
    tensors = hostile.sound_tensors()
    tensors[hostile.INDICES] = tensors[hostile.INDICES].to(getattr(torch, dtype))
    save_file(tensors, tmp_path / hostile.WEIGHTS)
    raw = read_peft(tmp_path).tensors["layer"]
    assert raw.coordinates.dtype == torch.int32
    assert raw.coordinates.tolist() == [[0, 1, 1, 7], [5, 0, 3, 2]]


def test_unsorted_entries_are_sorted_with_their_values(tmp_path: Path) -> None:
    hostile.write_sound(tmp_path)
    order = torch.tensor([3, 1, 0, 2])
    tensors = hostile.sound_tensors()
    tensors[hostile.VALUES] = tensors[hostile.VALUES][order].contiguous()
    tensors[hostile.INDICES] = tensors[hostile.INDICES][:, order].contiguous()
    save_file(tensors, tmp_path / hostile.WEIGHTS)
    raw = read_peft(tmp_path).tensors["layer"]
    assert raw.coordinates.tolist() == [[0, 1, 1, 7], [5, 0, 3, 2]]
    assert raw.values.tolist() == [0.5, -1.0, 2.0, 0.25]


def write_with(folder: Path, **tensors: torch.Tensor) -> None:
    """The sound file with further tensors, ``__`` in a name standing for a dot."""
    hostile.write_sound(folder)
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**hostile.sound_tensors(), **more}, folder / hostile.WEIGHTS)


def test_other_tensors_are_the_adapters_whole_tensors(tmp_path: Path) -> None:
    head = torch.arange(24.0).view(3, 8).bfloat16()
    count = torch.tensor(7)
    more = {"classifier__weight": head, "base_model__model__norm__num_batches_tracked": count}
    write_with(tmp_path, **more)
    adapter = Adapter.load(tmp_path, base={hostile.PARAMETER: hostile.SHAPE})
    assert list(adapter) == [hostile.PARAMETER]
    assert set(adapter.tensors) == {"classifier.weight", "norm.num_batches_tracked"}
    assert torch.equal(adapter.tensors["classifier.weight"], head)
    assert torch.equal(adapter.tensors["norm.num_batches_tracked"], count)
    adapter.save(tmp_path / "again", "peft")
    assert set(read_peft(tmp_path / "again").config["modules_to_save"]) == {"classifier", "norm"}
    assert Adapter.load(tmp_path / "again") == adapter


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("head__weight", torch.tensor([1.0, math.nan]), "not finite"),
        ("head__weight", torch.tensor([True]), "dtype BOOL is not one of"),
        ("head__weight", torch.zeros(2, dtype=torch.float8_e5m2), "dtype F8_E5M2 is not"),
        ("x__lora_A__weight", torch.zeros(2), "no tensor of a base model"),
        ("embed__token_adapter__trainable_tokens_delta", torch.zeros(2), "no tensor of a base"),
        ("head__modules_to_save__default__weight", torch.zeros(2), "no tensor of a base model"),
        ("layer__shira_weight__default", torch.zeros(2), "no tensor of a base model"),
        ("base_model__model__layer__weight", torch.zeros(8, 6), "has a delta in the file"),
    ],
)
def test_tensors_that_cannot_be_carried_are_refused_by_name(
    tmp_path: Path, name: str, tensor: torch.Tensor, match: str
) -> None:
    write_with(tmp_path, **{name: tensor})
    with pytest.raises(FileFormatError, match=match) as raised:
        read_peft(tmp_path)
    assert name.replace("__", ".") in str(raised.value)


def test_a_whole_tensor_is_there_once_and_of_the_bases_shape(tmp_path: Path) -> None:
    write_with(tmp_path, head__weight=torch.zeros(2), base_model__model__head__weight=torch.ones(2))
    with pytest.raises(FileFormatError, match=r"holds 'head.weight' twice"):
        read_peft(tmp_path)
    write_with(tmp_path, head__weight=torch.zeros(2))
    with pytest.raises(WrongBaseError, match=r"made for a 'head.weight' of shape \(2,\)"):
        Adapter.load(tmp_path, base={hostile.PARAMETER: hostile.SHAPE, "head.weight": (3,)})


def test_a_copy_of_an_adapted_weight_is_the_base_or_comes_along(tmp_path: Path) -> None:
    """PEFT saves adapted embeddings beside their deltas; a fingerprint tells that it is the base's.

    Without one the copy may be another, so the whole weight is carried with the delta in it.
    """
    base = torch.randn(hostile.SHAPE)
    write_with(tmp_path, base_model__model__layer__base_layer__weight=base)
    shapes = {hostile.PARAMETER: hostile.SHAPE}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config.pop("base_fingerprint", None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    folded = Adapter.load(tmp_path, base=shapes)
    raw = read_peft(tmp_path).tensors["layer"]
    row, column = raw.coordinates.long()
    expected = base.clone()
    expected[row, column] += raw.values
    assert not len(folded)
    assert torch.equal(folded.tensors[hostile.PARAMETER], expected)

    config["base_fingerprint"] = {hostile.PARAMETER: fingerprint(base[row, column])}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    sparse = Adapter.load(tmp_path, base=shapes)
    assert (list(sparse), sparse.tensors) == ([hostile.PARAMETER], {})

    config["base_fingerprint"] = {hostile.PARAMETER: fingerprint(base[row, column] + 1)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="save_embedding_layers=False"):
        Adapter.load(tmp_path, base=shapes)


@pytest.mark.parametrize(
    ("names", "given", "written"),
    [
        (["head.weight", "head.bias"], None, ["head"]),
        (["score.weight"], ["classifier", "score"], ["score"]),
        (["deep.head.dense.weight", "norm.bias"], ["head"], ["head", "norm"]),
        ([], ["head"], None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*modules_to_save")
def test_modules_to_save_name_the_modules_of_the_whole_tensors(
    tmp_path: Path, names: list[str], given: list[str] | None, written: list[str] | None
) -> None:
    tensors = {name: torch.ones(2) for name in names}
    adapter = Adapter({"a.weight": delta((2, 2), [1])}, {"modules_to_save": given}, tensors)
    adapter.save(tmp_path, "peft")
    assert read_peft(tmp_path).config["modules_to_save"] == written
    assert Adapter.load(tmp_path) == adapter


def test_the_file_itself_is_a_path_too(tmp_path: Path) -> None:
    adapter = Adapter({"a.weight": delta((4, 5), [2])}, {"random_seed": 7})
    adapter.save(tmp_path / "folder", "peft")
    beside = Adapter.load(tmp_path / "folder" / hostile.WEIGHTS)
    assert beside == adapter
    assert beside.metadata["random_seed"] == 7
    lone = (tmp_path / "folder" / hostile.WEIGHTS).rename(tmp_path / "lone.safetensors")
    assert read_peft(lone).config == {}
    assert Adapter.load(lone, base={"a.weight": (4, 5)}) == adapter


def test_keys_without_prefix_and_with_wrappers(tmp_path: Path) -> None:
    hostile.write_sound(tmp_path)
    tensors = {
        key.replace("base_model.model.layer", "_orig_mod.h.0.fc.base_layer"): tensor
        for key, tensor in hostile.sound_tensors().items()
    }
    save_file(tensors, tmp_path / hostile.WEIGHTS)
    raw = read_peft(tmp_path).tensors["h.0.fc"]
    assert raw.weight_name == "h.0.fc.weight"
    assert raw.key == "_orig_mod.h.0.fc.base_layer"


def test_a_recorded_shape_unlike_the_base_is_a_wrong_base(tmp_path: Path) -> None:
    Adapter({"a.weight": delta((4, 5), [2])}).save(tmp_path, "peft")
    with pytest.raises(WrongBaseError, match=r"a\.shira_weight.*wrong base.*\(4, 5\).*\(5, 4\)"):
        Adapter.load(tmp_path, base={"a.weight": (5, 4)})
    validate_against(read_peft(tmp_path), {"a.weight": (4, 5), "b.weight": (1,)})


def test_values_on_the_meta_device_are_refused_by_name(tmp_path: Path) -> None:
    meta = SparseDelta(Support((4, 5), torch.tensor([2])), torch.ones(1, device="meta"))
    head = {"head.weight": torch.ones(2, 2, device="meta")}
    for adapter, name in (
        (Adapter({"x.weight": meta}), "x.weight"),
        (Adapter({"x.weight": delta((4, 5), [2])}, None, head), "head.weight"),
    ):
        with pytest.raises(AdapterError, match=f"'{name}' is on the meta device"):
            adapter.save(tmp_path / "folder", "peft")
    assert not (tmp_path / "folder").exists()


def test_metadata_round_trip(tmp_path: Path) -> None:
    metadata = {
        "mask_type": "random",
        "random_seed": 3,
        "density": 0.01,
        "base_fingerprint": {"x.q_proj.weight": "bfloat16:0123456789abcdef"},
        "target_modules": ["q_proj"],
    }
    Adapter({"x.q_proj.weight": delta((4, 5), [2])}, metadata).save(tmp_path, "peft")
    read = Adapter.load(tmp_path).metadata
    assert {field: read[field] for field in metadata} == metadata
    assert "shira_shapes" not in read


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["q_proj", "v"], ["q_proj", "v"]),
        (r".*\.(q_proj|v)", r".*\.(q_proj|v)"),
        (["q_proj"], ["a.b.v", "a.q_proj"]),
        (r".*q_proj", ["a.b.v", "a.q_proj"]),
        ("all-linear", ["a.b.v", "a.q_proj"]),
        (None, ["a.b.v", "a.q_proj"]),
    ],
)
def test_target_modules_match_every_weight_written(
    tmp_path: Path, targets: Any, written: Any
) -> None:
    adapter = Adapter({"a.q_proj.weight": delta((2, 2), [1]), "a.b.v.weight": delta((2, 2), [1])})
    write_peft(adapter, tmp_path, config={"target_modules": targets, "layers_to_transform": [0]})
    config = read_peft(tmp_path).config
    assert config["target_modules"] == written
    assert config["layers_to_transform"] == ([0] if written == targets else None)


def test_r_is_what_makes_room_for_the_entries(tmp_path: Path) -> None:
    two = Adapter({"a.weight": delta((6, 8), list(range(28))), "b.weight": delta((1, 4), [0])})
    only = Adapter({"a.weight": two["a.weight"]})
    write_peft(only, tmp_path, config={"r": 32})
    assert read_peft(tmp_path).config["r"] == 2
    write_peft(two, tmp_path, config={"r": 3})  # no single r is true of both
    assert read_peft(tmp_path).config["r"] == 3


def test_modules_to_save_are_not_lost_silently(tmp_path: Path) -> None:
    adapter = Adapter({"a.weight": delta((2, 2), [1])}, {"modules_to_save": ["classifier"]})
    with pytest.warns(UserWarning, match="classifier"):
        adapter.save(tmp_path, "peft")
    assert read_peft(tmp_path).config["modules_to_save"] is None


@pytest.mark.parametrize(
    ("adapter", "options", "error", "match"),
    [
        ({"bias": delta((4,), [1])}, {}, AdapterError, "a parameter of none"),
        ({"weight": delta((4, 4), [1])}, {}, AdapterError, "weight"),
        ({"a.weight": delta((4, 4), [1])}, {"dtype": torch.int8}, ConfigError, "int8"),
        ({"a.weight": delta((4, 4), [1])}, {"indices_dtype": torch.uint8}, ConfigError, "uint8"),
        ({"a.weight": delta((40_000, 4), [1])}, {"indices_dtype": torch.int16}, AdapterError,
         r"a\.weight.*int16"),
        ({"a.weight": delta((4, 4), [1])}, {"config": {"x": object()}}, ConfigError, "'x'"),
        ({"a.weight": delta((4, 4), [1])}, {"config": {"x": math.nan}}, ConfigError, "'x'"),
        ({"a.weight": delta((4, 4), [1])}, {"config": {"peft_type": "LORA"}}, ConfigError, "LORA"),
        ({"a.weight": SparseDelta(Support((4,), torch.tensor([1])), torch.tensor([1e6]))},
         {"dtype": torch.float16}, AdapterError, r"a\.weight.*1 infinite.*float16"),
        ({"a.weight": SparseDelta(Support((4,), torch.tensor([1])), torch.tensor([math.nan]))},
         {}, AdapterError, r"a\.weight.*1 NaN"),
        ({"a.weight": SparseDelta(Support((4,), torch.tensor([1])),
                                  torch.tensor([1.0]).to(torch.float8_e5m2))},
         {}, AdapterError, "float8_e5m2"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_leaves_the_old_file(
    tmp_path: Path,
    adapter: dict[str, SparseDelta],
    options: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    old = Adapter({"old.weight": delta((2, 2), [3])})
    old.save(tmp_path, "peft")
    with pytest.raises(error, match=match):
        write_peft(Adapter(adapter), tmp_path, **options)
    assert Adapter.load(tmp_path) == old


def test_views_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    both = torch.arange(4.0)
    support = Support((2, 2), torch.tensor([0, 3]))
    adapter = Adapter(
        {
            "a.weight": SparseDelta(support, both[:2]),
            "b.weight": SparseDelta(support, both[::2]),
            "c.weight": SparseDelta(support, both[:2]),
            "d.weight": SparseDelta(support, both[1:3]),
        }
    )
    adapter.save(tmp_path, "peft")
    assert Adapter.load(tmp_path) == adapter


def test_unknown_format_and_file_in_the_way(tmp_path: Path) -> None:
    adapter = Adapter({"a.weight": delta((2, 2), [1])})
    with pytest.raises(ConfigError, match=r"'pft'.*Did you mean 'peft'"):
        save(adapter, tmp_path, format="pft")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        save(adapter, tmp_path / "file", format="peft")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no adapter_model\.safetensors"):
        Adapter.load(tmp_path)
