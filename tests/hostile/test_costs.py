# SPDX-License-Identifier: Apache-2.0
"""Small files that would take minutes, or gigabytes: each ends in an error at once.

The alarm is there so that a file which does cost more stops the test run no longer than that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shira import Adapter, SparseDelta, Support
from shira.convert import from_lora, is_lora, load_patches, merge, open_checkpoint, unmerge
from shira.errors import AdapterError, FileFormatError, ShiraError, did_you_mean
from tests.hostile import peft_files as peft
from tests.hostile.peft_files import entry, raw_file
from tests.store.test_patterns import HOSTILE

MANY = "9" * 4000
TOO_MANY = "9" * 5000  # which Python itself refuses to read
SIZES = json.dumps([2**61] * 100_000)

NUMBERS = {
    "4000 digits": MANY,
    "5000 digits": TOO_MANY,
    "a negative one": f"-{MANY}",
    "1e999": "1e999",
    "-1e999": "-1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "a fraction of 10^6 digits": "0." + "3" * 10**6,
    "half a surrogate pair": '"\\ud800"',
    "deep": "[" * 100_000 + "]" * 100_000,
}
SHAPES = {
    "a size of 4000 digits": f"[{MANY}, 2]",
    "sizes of 4000 digits": f"[{', '.join([MANY] * 100)}]",
    "2^62 entries": f"[{2**31}, {2**31}]",
    "sizes beyond": f"[{2**63}, 1]",
    "100,000 sizes": SIZES,
    "a size of zero among them": f"[0, {SIZES[1:-1]}]",
    "33 sizes": json.dumps([1] * 33),
    "a text": '"' + "8" * 10**6 + '"',
}
each_number = pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def _alarm():
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise TimeoutError("it takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(call, *arguments, match=None, kind=ShiraError, **options) -> None:
    with pytest.raises(kind, match=match) as caught:
        call(*arguments, **options)
    assert len(str(caught.value)) < 1000


@pytest.fixture
def folder(tmp_path):
    return peft.write_sound(tmp_path / "adapter")


def write_config(folder: Path, **raw: str) -> None:
    """The config of the sound folder with raw JSON for some fields."""
    fields = {key: json.dumps(value) for key, value in peft.sound_config().items()} | raw
    text = ", ".join(f"{json.dumps(key)}: {value}" for key, value in fields.items())
    (folder / peft.CONFIG).write_text("{" + text + "}")


# PEFT's format


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_in_a_config(pattern, folder):
    from shira import ShiraConfig

    for field, value in (
        ("target_modules", pattern),
        ("exclude_modules", pattern),
        ("modules_to_save", [pattern]),
        ("rank_pattern", {pattern: 1}),
    ):
        write_config(folder, **{field: json.dumps(value)})
        refused(Adapter.load, folder, base=PETITE, match=field, kind=FileFormatError)
        refused(ShiraConfig.from_pretrained, str(folder), match=field)


PETITE = {peft.PARAMETER: peft.SHAPE}


def test_a_config_is_refused_before_the_model_changes(folder):
    from shira import PeftModel

    write_config(folder, target_modules='"(.*a+)+b"')
    model = torch.nn.Sequential()
    model.add_module("a" * 60, torch.nn.Linear(6, 8))
    refused(PeftModel.from_pretrained, model, str(folder), match="target_modules")
    assert type(model[0]) is torch.nn.Linear


def test_a_pattern_in_the_metadata_of_an_adapter(tmp_path):
    delta = SparseDelta(Support((8, 8), torch.arange(3)), torch.ones(3))
    adapter = Adapter({"a" * 60 + ".weight": delta}, {"target_modules": "(a+)+b"})
    adapter.save(tmp_path / "compact")  # keeps what it is given, and never matches it
    refused(Adapter.load(tmp_path / "compact").save, tmp_path / "peft", format="peft")


def test_a_long_name_that_a_pattern_is_matched_with(tmp_path):
    delta = SparseDelta(Support((8, 8), torch.arange(3)), torch.ones(3))
    name = "a." * 10_000 + "a"
    adapter = Adapter({f"{name}.weight": delta}, {"target_modules": ".*.*.*x"})
    adapter.save(tmp_path, format="peft")
    assert json.loads((tmp_path / peft.CONFIG).read_text())["target_modules"] == [name]


@each_number
def test_numbers_in_a_config(number, folder):
    write_config(folder, r=number)
    refused(Adapter.load, folder, base=PETITE, match="config is", kind=FileFormatError)


@each_shape
def test_shapes_in_a_config(shape, folder):
    write_config(folder, shira_shapes=f'{{"{peft.PARAMETER}": {shape}}}')
    refused(Adapter.load, folder, kind=FileFormatError)


# Headers


@each_number
def test_numbers_in_a_header(number, folder):
    for text in (
        f'{{"{peft.VALUES}": {{"dtype": "F32", "shape": [4], "data_offsets": [0, {number}]}}}}',
        f'{{"{peft.VALUES}": {{"dtype": {number}, "shape": [4], "data_offsets": [0, 16]}}}}',
    ):
        (folder / peft.WEIGHTS).write_bytes(raw_file(text.encode(), bytes(16)))
        refused(Adapter.load, folder, base=PETITE, kind=FileFormatError)
        refused(open_checkpoint, folder / peft.WEIGHTS, kind=FileFormatError)


@each_shape
def test_shapes_in_a_header(shape, folder):
    text = f'{{"{peft.VALUES}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 16]}}}}'
    (folder / peft.WEIGHTS).write_bytes(raw_file(text.encode(), bytes(16)))
    refused(Adapter.load, folder, base=PETITE, kind=FileFormatError)
    refused(open_checkpoint, folder / peft.WEIGHTS, kind=FileFormatError)


def test_a_hint_among_many_names(folder):
    names = [f"{'model.layers' * 10}.{number}.q_proj" for number in range(20_000)]
    header = {f"{name}.shira_weight": entry("F32", [0], 0, 0) for name in names}
    (folder / peft.WEIGHTS).write_bytes(raw_file(header))
    refused(Adapter.load, folder, base=PETITE, match="missing", kind=FileFormatError)
    assert "4.q_proj'" in did_you_mean(f"{names[4]}x", names)


# The compact format


def compact(path: Path, table: str) -> Path:
    header = {"__metadata__": {"shira": table, "shira_crc32": "00000000"}}
    path.write_bytes(raw_file(header))
    return path


@each_number
def test_numbers_in_a_table(number, tmp_path):
    path = compact(tmp_path / "a", f'{{"version": {number}}}')
    refused(Adapter.load, path, kind=FileFormatError)


@each_shape
def test_shapes_in_a_table(shape, tmp_path):
    record = f'{{"shape": {shape}, "k": 0, "values": "F32", "indices": "gaps"}}'
    table = f'{{"version": 1, "library": "x", "metadata": {{}}, "parameters": {{"a": {record}}}}}'
    refused(Adapter.load, compact(tmp_path / "a", table), kind=FileFormatError)
    whole = f'{{"a": {{"dtype": "F32", "shape": {shape}}}}}'
    table = '{"version": 2, "library": "", "parameters": {}, "metadata": {}, "tensors": WHOLE}'
    table = table.replace("WHOLE", whole)
    refused(Adapter.load, compact(tmp_path / "a", table), kind=FileFormatError)


@pytest.mark.parametrize("value", [10**4000, -(10**50), "\ud800", {"a": ["\udfff"]}], ids=ascii)
@pytest.mark.parametrize("format", ["compact", "peft"])
def test_what_could_not_be_read_again_is_not_written(format, value, tmp_path):
    delta = SparseDelta(Support((8, 8), torch.arange(3)), torch.ones(3))
    refused(Adapter({"a.weight": delta}, {"x": value}).save, tmp_path / "a", format=format)
    text = value if isinstance(value, str) else "\ud800"
    refused(Adapter({f"{text}.weight": delta}).save, tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())


# LoRA


def lora(folder: Path, a: torch.Tensor, b: torch.Tensor, module: str = "layer", **raw: str) -> Path:
    folder.mkdir(exist_ok=True)
    name = f"base_model.model.{module}"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": '"LORA"', "r": str(a.shape[0]), "lora_alpha": "2"} | raw
    text = ", ".join(f'"{key}": {value}' for key, value in fields.items())
    (folder / "adapter_config.json").write_text("{" + text + "}")
    return folder


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@each_number
def test_numbers_in_the_config_of_a_lora(number, field, tmp_path):
    path = lora(tmp_path / "lora", torch.ones(1, 4), torch.ones(4, 1), **{field: number})
    refused(from_lora, path, kind=FileFormatError)


@pytest.mark.parametrize("alpha", ["1e300", "9" * 40, "3.5e38"])
def test_a_scaling_that_is_too_large(alpha, tmp_path):
    path = lora(tmp_path / "lora", torch.ones(1, 4), torch.ones(4, 1), lora_alpha=alpha)
    refused(from_lora, path, match="scaling", kind=AdapterError)
    lora(path, torch.ones(1, 4), torch.full((4, 1), 1e30), lora_alpha="3e38")
    refused(from_lora, path, match="not finite|NaN|infinit")


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_in_the_config_of_a_lora(pattern, tmp_path):
    for field in ("rank_pattern", "alpha_pattern"):
        raw = {field: json.dumps({pattern: 1})}
        path = lora(tmp_path / "lora", torch.ones(1, 4), torch.ones(4, 1), **raw)
        refused(from_lora, path, match=field, kind=FileFormatError)


def test_a_long_name_in_a_lora(tmp_path):
    path = lora(
        tmp_path / "lora",
        torch.ones(1, 4),
        torch.ones(4, 1),
        module="a." * 10_000 + "a",
        rank_pattern='{".*.*x": 1}',
    )
    refused(from_lora, path, match="rank_pattern", kind=FileFormatError)


def test_a_lora_that_unfolds_to_more_than_any_base_has(tmp_path):
    path = lora(tmp_path / "lora", torch.ones(1, 10**6), torch.ones(10**6, 1))
    refused(from_lora, path, match=r"\(1000000, 1000000\), which has 1000000000000", density=1e-9)
    base = {"layer.weight": torch.zeros(4, 4)}
    refused(from_lora, path, base=base, match="has shape")
    wide = lora(tmp_path / "wide", torch.ones(1, 1000), torch.ones(2000, 1))
    assert from_lora(wide).adapter.nnz == 3000


# Undo files, patches, checkpoints


@pytest.mark.parametrize("inside", [*NUMBERS.values(), *SHAPES.values()], ids=[*NUMBERS, *SHAPES])
def test_what_undo_files_and_patches_tell(inside, tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "base")
    told = {
        "shira-undo": ("tensors", f'{{"w": {{"file": "base", "merged": "", "shape": {inside}}}}}'),
        "shira-sparse-patch": ("shapes", f'{{"w": {inside}}}'),
    }
    for name, (about, text) in told.items():
        header = {
            "__metadata__": {"format": name, "version": "1", about: text},
            "w.indices": entry("I32", [0], 0, 0),
            "w.originals" if about == "tensors" else "w.values": entry("F32", [0], 0, 0),
        }
        (tmp_path / "file").write_bytes(raw_file(header))
        if about == "tensors":
            refused(unmerge, tmp_path / "base", tmp_path / "file", tmp_path / "out")
        else:
            refused(load_patches, tmp_path / "file")


@each_number
def test_numbers_beside_a_checkpoint(number, tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "part.safetensors")
    (tmp_path / "config.json").write_text(f'{{"a": {number}}}')
    with contextlib.suppress(FileFormatError):  # read or refused, and soon
        assert open_checkpoint(tmp_path).config.keys() == {"a"}
    (tmp_path / "config.json").unlink()
    index = f'{{"weight_map": {{"w": "part.safetensors"}}, "size": {number}}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(open_checkpoint, tmp_path, kind=FileFormatError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_do_not_block(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "base" / "model.safetensors")
    os.mkfifo(tmp_path / "base" / "config.json")
    os.mkfifo(tmp_path / "adapter_config.json")
    os.mkfifo(tmp_path / "undo")
    refused(open_checkpoint, tmp_path / "base", kind=FileFormatError)
    (tmp_path / "base" / "config.json").unlink()
    assert not is_lora(tmp_path)
    refused(unmerge, tmp_path / "base", tmp_path / "undo", tmp_path / "out")
    refused(load_patches, tmp_path / "undo")
    refused(Adapter.load, tmp_path / "undo")
    refused(merge, tmp_path / "undo", tmp_path / "base", tmp_path / "out")
