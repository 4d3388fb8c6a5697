# SPDX-License-Identifier: Apache-2.0
"""The compact format: what is written comes back, and its bytes are those of the specification."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError
from shira.masks import block_support, random_support, struct_support
from shira.store import read_compact, save
from shira.store.compact import ERROR_BOUND, dequantize, quantize
from shira.store.table import LARGEST_SCALE
from shira.support import Support

GOLDEN = Path(__file__).with_name("golden")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def delta(support: Support, dtype: torch.dtype = torch.float32, seed: int = 0) -> SparseDelta:
    values = torch.randn(support.nnz, generator=torch.Generator().manual_seed(seed))
    return SparseDelta(support, values.to(dtype))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Up to four weights of no to four dimensions, any number of entries in each, even none."""
    deltas = {}
    for name in draw(st.lists(st.text(max_size=6), unique=True, max_size=4)):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
        numel = math.prod(shape)
        chosen = draw(st.sets(st.integers(0, numel - 1), max_size=40)) if numel else set()
        indices = torch.tensor(sorted(chosen), dtype=torch.int64)
        deltas[name] = delta(
            Support(shape, indices),
            draw(st.sampled_from(DTYPES)),
            draw(st.integers(0, 2**31)),
        )
    json_value = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    return Adapter(deltas, draw(st.dictionaries(st.text(max_size=5), json_value, max_size=3)))


@settings(max_examples=80, deadline=None)
@given(adapters(), st.booleans())
def test_round_trip_is_bit_for_bit(adapter: Adapter, mapped: bool) -> None:
    if "base_fingerprint" in adapter.metadata:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        adapter.save(path)
        read = Adapter.load(path, mapped=mapped)
        assert read == adapter
        assert list(read) == list(adapter)
        assert read.metadata == adapter.metadata
        assert {n: d.support.shape for n, d in read.items()} == {
            n: d.support.shape for n, d in adapter.items()
        }


def of_every_coding() -> tuple[Adapter, dict[str, str]]:
    deltas = {
        "gaps.weight": delta(random_support((64, 50), 64, seed=5)),
        "block.weight": delta(block_support((64, 50), 700, seed=1, name="b", block_size=8)),
        "struct.weight": delta(struct_support((64, 50), 400)),
        "seed.weight": delta(random_support((64, 50), 64, seed=7, name="seed.weight", slot=2)),
    }
    metadata = {"mask_type": "random", "random_seed": 7, "mask_slot": 2}
    codings = ["gaps", "blocks", "blocks", "seed"]
    return Adapter(deltas, metadata), dict(zip(deltas, codings, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, None])
def test_each_parameter_takes_the_smallest_coding(tmp_path: Path, dtype: Any) -> None:
    adapter, codings = of_every_coding()
    path = tmp_path / "a.safetensors"
    adapter.save(path, dtype=dtype)
    read = read_compact(path)
    assert {name: record.indices for name, record in read.records.items()} == codings
    for name, found in read.adapter.items():
        assert found.support == adapter[name].support
        assert torch.equal(found.values, adapter[name].values.to(dtype or torch.float32))
    assert read.library.startswith("shira ")


def test_int8_loads_as_float32_within_its_bound(tmp_path: Path) -> None:
    adapter, _ = of_every_coding()
    path = tmp_path / "a.safetensors"
    adapter.save(path, dtype=torch.int8)
    read = read_compact(path)
    for name, found in read.adapter.items():
        assert found.values.dtype == torch.float32
        scale = read.records[name].scale
        assert scale is not None
        error = (found.values.double() - adapter[name].values.double()).abs().max()
        assert float(error) <= ERROR_BOUND * scale
    with safe_open(path, "pt") as file:
        assert file.get_tensor("gaps.weight.values").dtype == torch.int8


@pytest.mark.parametrize("indices", ["gaps", "blocks", "seed"])
def test_a_coding_can_be_asked_for(tmp_path: Path, indices: Any) -> None:
    adapter, codings = of_every_coding()
    only = Adapter(
        {
            name: adapter[name]
            for name, coding in codings.items()
            if coding == indices or indices == "gaps"
        },
        adapter.metadata,
    )
    path = tmp_path / "a.safetensors"
    only.save(path, indices=indices)
    assert {record.indices for record in read_compact(path).records.values()} == {indices}
    assert Adapter.load(path) == only
    if indices != "gaps":
        with pytest.raises(AdapterError, match=rf"'gaps\.weight'.*cannot be stored as {indices}"):
            adapter.save(path, indices=indices)
        assert Adapter.load(path) == only


@pytest.mark.parametrize(
    "metadata",
    [
        {"mask_type": "random", "random_seed": 8, "mask_slot": 2},
        {"mask_type": "random", "random_seed": 7},
        {"mask_type": "random", "random_seed": 7, "mask_slot": 10**9},
        {"mask_type": "random", "random_seed": "7", "mask_slot": 2},
        {"mask_type": "random", "random_seed": None, "mask_slot": 2},
        {"mask_type": "grad", "random_seed": 7, "mask_slot": 2},
        {},
    ],
)
def test_a_seed_is_believed_only_if_it_gives_the_indices(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    adapter, _ = of_every_coding()
    only = Adapter({"seed.weight": adapter["seed.weight"]}, metadata)
    only.save(tmp_path / "a.safetensors")
    read = read_compact(tmp_path / "a.safetensors")
    assert read.records["seed.weight"].indices == "gaps"
    assert read.adapter == only


def test_bytes_a_parameter_at_two_percent(tmp_path: Path) -> None:
    """What the README claims, on one 1024 x 1024 weight, header and all."""
    k = 1024 * 1024 // 50
    support = random_support((1024, 1024), k, seed=3, name="a.weight")
    adapter = Adapter({"a.weight": delta(support)}, {"mask_type": "random", "random_seed": 3})
    path = tmp_path / "a.safetensors"

    def size(**options: Any) -> float:
        adapter.save(path, **options)
        return path.stat().st_size / k

    assert size(dtype=torch.bfloat16, indices="gaps") <= 3.1
    assert size(dtype=torch.bfloat16, indices="seed") <= 2.05
    assert size(dtype=torch.int8) <= 1.05
    adapter.save(tmp_path / "peft", "peft", torch.bfloat16)
    assert (tmp_path / "peft" / "adapter_model.safetensors").stat().st_size / k <= 6.1


def golden_adapter() -> Adapter:
    block = torch.zeros(16, 12, dtype=torch.bool)
    block[4:8, 8:12] = block[8:12, 0:4] = block[0, 1] = block[15, 11] = True
    values = torch.tensor([0.5, -1.0, 2.0, 0.25])
    return Adapter(
        {
            "gaps.weight": SparseDelta(
                Support((20, 30), torch.tensor([5, 6, 300, 599])), values.bfloat16()
            ),
            "blocks.weight": SparseDelta(Support.from_mask(block), torch.arange(1.0, 35.0).half()),
            "seed.weight": SparseDelta(
                random_support((8, 10), 4, seed=3, name="seed.weight"), values
            ),
        },
        {
            "mask_type": "random",
            "random_seed": 3,
            "base_model_name_or_path": "some/model",
            "revision": "main",
            "base_fingerprint": {"gaps.weight": "float32:0123456789abcdef"},
        },
    )


def golden_adapter_with_a_head() -> Adapter:
    head = torch.tensor([[1.5, -2.0], [0.0, 3.0], [1.0, -0.5]])
    tensors = {"head.weight": head.bfloat16(), "norm.count": torch.tensor(7), "head.bias": head[0]}
    return Adapter(golden_adapter(), golden_adapter().metadata, tensors)


@pytest.mark.parametrize(
    ("name", "dtype", "adapter"),
    [
        ("version-1.safetensors", None, golden_adapter()),
        ("version-1-int8.safetensors", torch.int8, golden_adapter()),
        ("version-2.safetensors", None, golden_adapter_with_a_head()),
    ],
)
def test_golden_bytes(
    tmp_path: Path, name: str, dtype: torch.dtype | None, adapter: Adapter
) -> None:
    """Both versions, byte for byte; these files are to be readable for ever."""
    golden = (GOLDEN / name).read_bytes()
    read = Adapter.load(GOLDEN / name)
    assert read.metadata == adapter.metadata
    assert {n: d.support for n, d in read.items()} == {n: d.support for n, d in adapter.items()}
    if dtype is None:
        assert read == adapter
    path = tmp_path / name
    adapter.save(path, dtype=dtype)
    written = path.read_bytes()
    assert without_the_writer(written) == without_the_writer(golden)


def without_the_writer(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A file with the version of the library left out, and the checksum that covers it."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    table = json.loads(metadata["shira"])
    assert int(metadata["shira_crc32"], 16) == zlib.crc32(
        metadata["shira"].encode() + in_the_order_of_the_table(header, table, raw[8 + length :])
    )
    assert table.pop("library").startswith("shira ")
    return {"table": table, "header": header, "order": list(header)}, raw[8 + length :]


def in_the_order_of_the_table(header: Any, table: Any, data: bytes) -> bytes:
    parts = []
    for name in table["parameters"]:
        for kind in ("values", "gaps", "blocks", "rest"):
            if claim := header.get(f"{name}.{kind}"):
                parts.append(data[slice(*claim["data_offsets"])])
    for name in table.get("tensors", {}):
        parts.append(data[slice(*header[f"{name}.whole"]["data_offsets"])])
    return b"".join(parts)


def test_the_golden_file_is_what_the_specification_says() -> None:
    """Read by hand, with nothing of shira's."""
    raw = (GOLDEN / "version-1.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    table = json.loads(header["__metadata__"]["shira"])
    assert table["version"] == 1
    assert table["parameters"]["gaps.weight"] == {
        "shape": [20, 30], "k": 4, "values": "BF16", "indices": "gaps",
    }  # fmt: skip
    assert table["parameters"]["blocks.weight"] == {
        "shape": [16, 12], "k": 34, "values": "F16", "indices": "blocks", "block": [4, 4],
    }  # fmt: skip
    assert table["parameters"]["seed.weight"] == {
        "shape": [8, 10], "k": 4, "values": "F32", "indices": "seed",
        "seed": 3, "slot": 0, "check": "d7c615e5",
    }  # fmt: skip

    def data(name: str) -> bytes:
        start, end = header[name]["data_offsets"]
        return raw[8 + length + start : 8 + length + end]

    assert data("gaps.weight.gaps") == bytes([5, 0, 255, 38, 255, 43])
    assert data("gaps.weight.values").hex() == "003f80bf0040803e"
    assert data("blocks.weight.blocks") == bytes([5, 0])
    assert data("blocks.weight.rest") == bytes([1, 189])
    assert data("seed.weight.values").hex() == "0000003f000080bf000000400000803e"
    # The indices of the seed, and their checksum.
    flat = from_the_seed((8, 10), 4, 3, 0, "seed.weight")
    packed = b"".join(index.to_bytes(4, "little") for index in flat)
    assert f"{zlib.crc32(packed):08x}" == "d7c615e5"
    # Widest first, so every tensor is aligned to its elements.
    kinds = [name for name in header if name != "__metadata__"]
    assert kinds[0] == "seed.weight.values"
    assert [header[name]["dtype"] for name in kinds] == ["F32", "BF16", "F16", "U8", "U8", "U8"]


def test_whole_tensors_are_what_the_specification_says() -> None:
    raw = (GOLDEN / "version-2.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    table = json.loads(header["__metadata__"]["shira"])
    assert table["version"] == 2
    assert table["tensors"] == {
        "head.weight": {"dtype": "BF16", "shape": [3, 2]},
        "norm.count": {"dtype": "I64", "shape": []},
        "head.bias": {"dtype": "F32", "shape": [2]},
    }
    start, end = header["head.weight.whole"]["data_offsets"]
    assert raw[8 + length + start : 8 + length + end].hex() == "c03f00c000004040803f00bf"
    kinds = [claim["dtype"] for name, claim in header.items() if name != "__metadata__"]
    assert kinds == ["I64", "F32", "F32", "BF16", "F16", "BF16", "U8", "U8", "U8"]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 4)])
def test_whole_tensors_round_trip(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, mapped: bool
) -> None:
    adapter, _ = of_every_coding()
    head = torch.randn(shape).mul_(9).to(dtype)
    adapter = Adapter(adapter, adapter.metadata, {"head.weight": head, "gaps": head.t()})
    adapter.save(tmp_path / "a.safetensors", dtype=torch.float16)
    read = Adapter.load(tmp_path / "a.safetensors", mapped=mapped)
    assert read.tensors["head.weight"].shape == shape
    assert Adapter({}, None, read.tensors) == Adapter({}, None, adapter.tensors)


@pytest.mark.parametrize("format", ["compact", "peft"])
@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.tensor([math.inf]), r"'head.weight': .*not finite: 0 NaN and 1 infinite"),
        (torch.tensor([True]), r"'head.weight': a whole tensor of torch.bool cannot be stored"),
    ],
)
def test_whole_tensors_that_no_file_holds(
    tmp_path: Path, format: Any, tensor: torch.Tensor, match: str
) -> None:
    adapter = Adapter(golden_adapter(), None, {"head.weight": tensor})
    with pytest.raises(AdapterError, match=match):
        adapter.save(tmp_path / "a", format)
    assert not any(tmp_path.iterdir())


def from_the_seed(shape: tuple[int, ...], k: int, seed: int, slot: int, name: str) -> list[int]:
    """The support of a seed, in plain Python from ``docs/file-format.md``."""
    word = 2**64 - 1
    n = math.prod(shape)
    text = str(seed).encode() + b"\0" + name.encode()
    digest = hashlib.blake2b(text, digest_size=64, person=b"shira.random").digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(8)]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def f(x: int, key: int, size: int) -> int:
        m = (x + key) * 0x9E3779B97F4A7C15 & word
        m ^= m >> 32
        m = m * 0xD1342543DE82EF95 & word
        return (m >> 32) * size >> 32

    def one_pass(p: int) -> int:
        left, right = divmod(p, b)
        for i in range(8):
            if i % 2 == 0:
                left = (left + f(right, keys[i], a)) % a
            else:
                right = (right + f(left, keys[i], b)) % b
        return left * b + right

    images = []
    for point in range(slot * k, slot * k + k):
        image = one_pass(point)
        while image >= n:
            image = one_pass(image)
        images.append(image)
    return sorted(images)


@pytest.mark.parametrize("shape", [(8, 10), (37, 3, 3, 3), (1,), (5000, 1), (2**20, 2**13)])
def test_the_seed_is_what_the_specification_says(shape: tuple[int, ...]) -> None:
    k = min(60, math.prod(shape))
    slot = 0 if k == math.prod(shape) or math.prod(shape) < 3 * k else 2
    for seed, name in ((3, "seed.weight"), (-1, ""), (2**70, "h\u00f6he")):
        made = random_support(shape, k, seed=seed, name=name, slot=slot)
        assert made.indices.tolist() == from_the_seed(shape, k, seed, slot, name)


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    adapter, _ = of_every_coding()
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    with safe_open(path, "pt") as file:
        for name in adapter:
            assert torch.equal(file.get_tensor(f"{name}.values"), adapter[name].values)


def test_mapped_values_are_not_copied(tmp_path: Path) -> None:
    support = random_support((1000, 1000), 100_000, seed=1)
    path = tmp_path / "a.safetensors"
    Adapter({"a": delta(support, torch.bfloat16), "b": delta(support)}).save(path)
    mapped = Adapter.load(path, mapped=True)
    regions = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for name in "ab":
        at = mapped[name].values.data_ptr()
        assert any(start <= at < end for start, end in regions), name
        assert at % mapped[name].values.element_size() == 0
    # Replacing the file as a whole leaves the mapped one alone.
    kept = {name: mapped[name].values.clone() for name in "ab"}
    Adapter({"a": delta(support, seed=9)}).save(path)
    assert all(torch.equal(mapped[name].values, kept[name]) for name in "ab")


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    adapter = Adapter({"a.weight": delta(Support((4, 5), torch.tensor([2])))})
    adapter.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert Adapter.load(tmp_path) == adapter
    adapter.save(tmp_path / "new" / "folder" / "a.safetensors")  # made if absent
    adapter.save(tmp_path / "no-suffix")
    assert Adapter.load(tmp_path / "no-suffix") == adapter
    adapter.save(tmp_path / "peft", "peft")
    with pytest.raises(ConfigError, match=r"PEFT's format.*peft\.safetensors.*format='peft'"):
        adapter.save(tmp_path / "peft")
    assert Adapter.load(tmp_path / "peft") == adapter


@pytest.mark.parametrize(
    ("values", "options", "error", "match"),
    [
        ([1.0], {"dtype": torch.int16}, ConfigError, "int16"),
        ([1.0], {"indices": "gap"}, ConfigError, "Did you mean 'gaps'"),
        ([1.0], {"format": "compct"}, ConfigError, "Did you mean 'compact'"),
        ([1.0], {"format": "peft", "indices": "gaps"}, ConfigError, "compact"),
        ([1e6], {"dtype": torch.float16}, AdapterError, r"a\.weight.*1 infinite.*float16"),
        ([math.nan], {}, AdapterError, r"a\.weight.*1 NaN"),
        ([math.inf], {"dtype": torch.int8}, AdapterError, r"a\.weight.*1 infinite"),
        (torch.tensor([1e300], dtype=torch.float64), {"dtype": torch.int8}, AdapterError, "infin"),
        (torch.ones(1).to(torch.float8_e5m2), {}, AdapterError, "float8_e5m2"),
        (torch.ones(1, device="meta"), {}, AdapterError, r"a\.weight.*meta device.*load the model"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, values: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    path = tmp_path / "a.safetensors"
    support = Support((2, 2), torch.tensor([3]))
    old = Adapter({"old": delta(support)})
    old.save(path)
    values = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    with pytest.raises(error, match=match):
        Adapter({"a.weight": SparseDelta(support, values)}).save(path, **options)
    assert Adapter.load(path) == old


def test_metadata_that_is_no_json(tmp_path: Path) -> None:
    adapter = Adapter({}, {"what": object()})
    with pytest.raises(ConfigError, match="'what'"):
        save(adapter, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    save(Adapter({}, {}), tmp_path / "empty.safetensors")
    assert Adapter.load(tmp_path / "empty.safetensors") == Adapter({})


@pytest.mark.parametrize("metadata", [{"what": {1: 2, "b": 3}}, {1: 2}])
def test_metadata_whose_keys_have_no_order_are_refused_by_pefts_format(
    tmp_path: Path, metadata: Any
) -> None:
    with pytest.raises(ConfigError, match=r"metadata cannot be written as JSON.*keys are texts"):
        save(Adapter({}, metadata), tmp_path / "folder", format="peft")
    assert not list(tmp_path.iterdir())


def test_values_that_are_views_of_something(tmp_path: Path) -> None:
    both = torch.arange(6.0)
    support = Support((2, 2), torch.tensor([0, 3]))
    adapter = Adapter(
        {
            "a": SparseDelta(support, both[:2]),
            "b": SparseDelta(support, both[::3]),
            "c": SparseDelta(support, both[2:4].requires_grad_()),
        }
    )
    path = tmp_path / "a.safetensors"
    for dtype in (None, torch.bfloat16, torch.int8):
        adapter.save(path, dtype=dtype)
        assert Adapter.load(path)["b"].values.tolist()[0] == 0.0
    adapter.save(path)
    assert Adapter.load(path) == Adapter(
        {name: SparseDelta(d.support, d.values.detach()) for name, d in adapter.items()}
    )
    assert both.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_weights_of_more_than_two_to_the_31_entries(tmp_path: Path) -> None:
    shape = (2**16, 2**16)
    support = Support(shape, torch.tensor([0, 2**31, 2**32 - 1]))
    seeded = random_support(shape, 100, seed=1, name="b")
    adapter = Adapter(
        {"a": delta(support), "b": delta(seeded)}, {"mask_type": "random", "random_seed": 1}
    )
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    assert path.stat().st_size < 2000
    read = read_compact(path)
    assert read.adapter == adapter
    assert read.records["b"].indices == "seed"


# Values in a byte each


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def check_int8(values: torch.Tensor) -> None:
    steps, scale = quantize(values)
    back = dequantize(steps, scale)
    assert steps.dtype == torch.int8
    assert back.dtype == torch.float32
    assert bool(torch.isfinite(back).all())
    assert not values.numel() or int(steps.min()) >= -127
    assert float(torch.tensor(scale, dtype=torch.float32)) == scale <= LARGEST_SCALE
    error = (back.double() - values.double()).abs()
    assert bool((error <= ERROR_BOUND * scale).all())
    assert bool((back[values == 0] == 0).all())


@settings(max_examples=300, deadline=None)
@given(st.lists(FINITE, max_size=20))
def test_the_bound_holds(values: list[float]) -> None:
    check_int8(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0, -0.0],
        [torch.finfo(torch.float32).max, 1.0, -torch.finfo(torch.float32).max],
        [math.ldexp(1.0, -149), -math.ldexp(1.0, -149)],
        [math.ldexp(1.0, -126), math.ldexp(1.0, -149), math.ldexp(127.0, -126)],
    ],
)
def test_the_extremes_of_float32(values: list[float]) -> None:
    check_int8(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    check_int8(torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_the_default_device_does_not_matter() -> None:
    for values in (torch.tensor([1.0, -2.0]), torch.zeros(2)):
        want = quantize(values)
        with torch.device("meta"):
            steps, scale = quantize(values)
        assert torch.equal(steps, want[0])
        assert scale == want[1]


def test_the_bound_is_no_wider_than_half_a_step_needs() -> None:
    """Halves are met: a smaller bound would not hold."""
    values = torch.tensor([127.0, 0.5, 1.5, 2.5])
    steps, scale = quantize(values)
    assert (steps.tolist(), scale) == ([127, 0, 2, 2], 1.0)
    assert ERROR_BOUND < 0.50002
