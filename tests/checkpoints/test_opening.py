# SPDX-License-Identifier: Apache-2.0
"""Every door opens the same files of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shira import Adapter, ShiraError, SparseDelta, Support
from shira.base import fingerprint_fields
from shira.checkpoints import open_checkpoint, shapes_of
from shira.checkpoints.models import source_of
from shira.cli import main
from shira.cli.summary import summarize
from shira.convert import extract, merge, to_patches
from shira.errors import FileFormatError, MergeError, WrongBaseError
from tests.convert.conftest import SHAPES, SHARDS, write_checkpoint

NAME = "up.weight"
SHAPE = (6, 4)
INDEX = "model.safetensors.index.json"


def weights(shape=SHAPE, shift=0.0, name=NAME) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors: the weight, and another beside it."""
    whole = torch.arange(float(shape[0] * shape[1])).view(shape) + shift
    return {name: whole, "norm.weight": torch.ones(4)}


def write_index(folder: Path, placed: dict[str, str], name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], stem: str = "model") -> None:
    placed = {}
    for at, (name, tensor) in enumerate(tensors.items(), 1):
        placed[name] = f"{stem}-0000{at}-of-0000{len(tensors)}.safetensors"
        save_file({name: tensor}, folder / placed[name])
    write_index(folder, placed, f"{stem}.safetensors.index.json")


# --- folders: the one that is right is that of `SHAPE` ------------------------------------------

OTHER = (3, 4)  # the shape in files that are not the checkpoint's


def one_file(folder):
    save_file(weights(), folder / "model.safetensors")


def beside_another_file(folder):
    one_file(folder)
    save_file(weights(OTHER), folder / "aaa.safetensors")
    save_file(weights(OTHER), folder / "zzz.safetensors")


def beside_an_index(folder):
    """transformers takes the one file."""
    write_shards(folder, weights(OTHER))
    one_file(folder)


def sharded(folder):
    write_shards(folder, weights())


def beside_a_stale_shard(folder):
    write_shards(folder, weights())
    save_file(weights(OTHER), folder / "model-00009-of-00009.safetensors")


def beside_another_index(folder):
    """As in repositories that ship the original weights as well."""
    write_shards(folder, weights(OTHER), "consolidated")
    write_shards(folder, weights())


def of_links(folder):
    """A snapshot in the cache of the hub."""
    blobs = folder / "blobs"
    blobs.mkdir()
    save_file(weights(), blobs / "0123abcd")
    (folder / "model.safetensors").symlink_to(blobs / "0123abcd")


def beside_an_adapter(folder):
    save_file(weights(), folder / "weights.safetensors")
    for name in ("adapter_model.safetensors", "adapter.safetensors"):
        save_file({NAME: torch.ones(OTHER)}, folder / name)


def of_diffusers(folder):
    """diffusers takes the index."""
    save_file(weights(OTHER), folder / "diffusion_pytorch_model.safetensors")
    write_shards(folder, weights(), "diffusion_pytorch_model")


def named_by_its_config(folder):
    save_file(weights(OTHER), folder / "model.safetensors")
    save_file(weights(), folder / "own.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "own.safetensors"}')


def of_several_files(folder):
    for at, (name, tensor) in enumerate(weights().items()):
        save_file({name: tensor}, folder / f"part{at}.safetensors")


def beside_a_pickle(folder):
    one_file(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def with_a_prefix(folder):
    save_file(weights(name=f"encoder.{NAME}"), folder / "model.safetensors")


def beside_a_packed_tensor(folder):
    packed = {"other.weight": torch.ones(4, dtype=torch.int8)}
    save_file({**weights(), **packed}, folder / "model.safetensors")


GOOD = [
    *(one_file, beside_another_file, beside_an_index, sharded, beside_a_stale_shard),
    *(beside_another_index, of_links, beside_an_adapter, of_diffusers, named_by_its_config),
    *(of_several_files, beside_a_pickle, with_a_prefix, beside_a_packed_tensor),
]


def nothing(folder):
    folder.rmdir()


def empty(folder):
    pass


def a_pickle_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (folder / "optimizer.pt").write_bytes(b"\x80\x02}q\x00.")


def an_adapter_alone(folder):
    save_file({NAME: torch.ones(SHAPE)}, folder / "adapter_model.safetensors")


def a_pipeline(folder):
    for part in ("unet", "vae"):
        (folder / part).mkdir()
        save_file(weights(), folder / part / "diffusion_pytorch_model.safetensors")


def a_missing_shard(folder):
    write_shards(folder, weights())
    (folder / "model-00002-of-00002.safetensors").unlink()


def a_link_into_nowhere(folder):
    save_file(weights(), folder / "other.safetensors")
    (folder / "model.safetensors").symlink_to(folder / "gone")


def two_indices(folder):
    write_shards(folder, weights(), "a")
    write_shards(folder, weights(), "b")


def two_libraries(folder):
    one_file(folder)
    save_file(weights(OTHER), folder / "diffusion_pytorch_model.safetensors")


def one_name_twice(folder):
    save_file(weights(), folder / "a.safetensors")
    save_file(weights(OTHER), folder / "b.safetensors")


def an_odd_name_in_its_config(folder):
    one_file(folder)
    (folder / "config.json").write_text('{"transformers_weights": "../own.safetensors"}')


def two_prefixes(folder):
    one = {f"x.{NAME}": torch.ones(SHAPE), f"y.{NAME}": torch.ones(SHAPE)}
    save_file(one, folder / "model.safetensors")


def another_model(folder):
    save_file({"down.weight": torch.ones(SHAPE)}, folder / "model.safetensors")


BAD = {
    nothing: (FileNotFoundError, "no such file or folder"),
    empty: (FileFormatError, "the folder has no safetensors checkpoint"),
    a_pickle_alone: (FileFormatError, "pytorch_model.bin is a pickle.*save_pretrained"),
    an_adapter_alone: (FileFormatError, "adapter_model.safetensors is an adapter's"),
    a_pipeline: (FileFormatError, "its folders unet, vae have: give one of them"),
    a_missing_shard: (FileNotFoundError, "model-00002-of-00002.safetensors"),
    a_link_into_nowhere: (FileNotFoundError, "model.safetensors"),
    two_indices: (FileFormatError, "2 checkpoints, a.safetensors.index.json, b.safe"),
    two_libraries: (FileFormatError, "2 checkpoints, model.safetensors, diffusion_py"),
    one_name_twice: (FileFormatError, "both a.safetensors and b.safetensors hold 'norm.weight'"),
    an_odd_name_in_its_config: (FileFormatError, "config.json says .*'../own.safetensors'"),
    two_prefixes: (WrongBaseError, "fit the checkpoint in 2 ways"),
    another_model: (WrongBaseError, "there is no 'up.weight'"),
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "base"
    path.mkdir()
    return path


def made_for(base: dict[str, torch.Tensor]) -> Adapter:
    support = Support(SHAPE, torch.tensor([1, 7, 20]))
    fields = {"r": 1, "target_modules": ["up"]}
    known = fingerprint_fields({NAME: base[NAME].view(-1)[[1, 7, 20]]})
    deltas = {NAME: SparseDelta(support, torch.tensor([0.5, -1.0, 2.0]))}
    return Adapter(deltas, {**fields, **known})


@pytest.fixture
def stock(tmp_path):
    """An adapter that does not record the shape, as stock PEFT's."""
    made_for(weights()).save(tmp_path / "stock", format="peft")
    path = tmp_path / "stock" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["shira_shapes"]
    path.write_text(json.dumps(config))
    return tmp_path / "stock"


# --- doors: each says which shape it found ------------------------------------------------------


def by_shapes(base, stock, out):
    return shapes_of(base, [NAME])[NAME]


def by_load(base, stock, out):
    return Adapter.load(stock, base=base)[NAME].support.shape


def by_summary(base, stock, out):
    (target,) = summarize(stock, open_checkpoint(base)).targets
    assert target.base == "same"
    return target.shape


def by_merge(base, stock, out):
    told = merge(stock, base, out / "merged")
    assert [target.base for target in told.targets] == ["same"]
    target = out / "merged" / told.targets[0].file
    (key,) = [key for key in load_file(target) if key.endswith(NAME)]
    return tuple(load_file(target)[key].shape)


def by_patches(base, stock, out):
    (patch,) = to_patches(made_for(weights()), base)
    return patch.full_shape


def by_extract(base, stock, out):
    shapes_of(base, [NAME])  # of a pair of models that share no name it speaks otherwise
    changed = {key: torch.zeros(shape) for key, shape in shapes_of(base).items()}
    (change,) = extract(base, changed, density=0.5, include=[f"*{NAME}"]).changes
    return change.shape


PYTHON = [by_shapes, by_load, by_summary, by_merge, by_patches, by_extract]


@pytest.mark.parametrize("make", GOOD, ids=lambda make: make.__name__)
def test_every_door_opens_the_same_files(make, folder, stock, tmp_path):
    make(folder)
    for door in PYTHON:
        assert tuple(door(folder, stock, tmp_path)) == SHAPE, door.__name__


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_every_door_says_the_same_of_what_is_none(make, folder, stock, tmp_path):
    make(folder)
    error, match = BAD[make]
    said = set()
    for door in PYTHON:
        with pytest.raises(error, match=match) as caught:
            door(folder, stock, tmp_path)
        assert isinstance(caught.value, (ShiraError, FileNotFoundError))
        if door is not by_patches or make is not another_model:  # which it words otherwise
            said.add(str(caught.value))
    assert len(said) == 1
    assert not (tmp_path / "merged").exists()


def commands(base, stock, out):
    """A line for every command that takes a base and an adapter, and what it writes."""
    compact, page = out / "made.safetensors", out / "page.html"
    return [
        ["inspect", stock, "--json", "--base", base],
        ["merge", stock, "--base", base, "-o", out / "merged"],
        ["convert", stock, "--base", base, "-o", compact],
        ["convert", stock, "--format", "patch", "--base", base, "-o", out / "patch.safetensors"],
        ["fuse", stock, stock, "--base", base, "-o", out / "fused"],
        ["overlap", stock, stock, "--base", base, "--json"],
        ["report", stock, "--fast", "--base", base, "-o", page],
        ["switch-bench", stock, "--base", base, "--repeats", "1", "--no-compare", "--json"],
    ]


def run(capsys, line):
    """Exit status and standard error of a command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in line])
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("make", [beside_another_file, with_a_prefix, a_pickle_alone, nothing])
def test_every_command_opens_the_same_files(make, folder, stock, tmp_path, capsys):
    make(folder)
    said = set()
    for line in commands(folder, stock, tmp_path):
        status, error = run(capsys, line)
        assert (status == 0) == (make not in BAD), (line, error)
        said.add(error if make in BAD else "")
    assert len(said) == 1
    if make not in BAD:
        assert Adapter.load(tmp_path / "made.safetensors")[NAME].support.shape == SHAPE
        assert Adapter.load(tmp_path / "fused")[NAME].support.shape == SHAPE


def test_a_name_on_the_hub(folder, stock, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    one_file(folder)
    asked = []

    def snapshot(name, **options):
        asked.append((name, "*.bin" in options["ignore_patterns"]))
        if name == "no/model":
            raise FileNotFoundError(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    for name in ("some/model", "gpt2"):
        for door in PYTHON:
            assert tuple(door(name, stock, tmp_path)) == SHAPE
            shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    assert {*asked} == {("some/model", True), ("gpt2", True)}
    for line in commands("some/model", stock, tmp_path):
        assert run(capsys, line) == (0, ""), line
    nowhere = "no such file or folder here, and the hub did not give a model of that name"
    for door in PYTHON:
        with pytest.raises(FileNotFoundError, match=nowhere):
            door("no/model", stock, tmp_path)
    del asked[:]
    for path in ("./some/model", "/no/model", "~/model", "a/b/c", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"no such file or folder: '"):
            open_checkpoint(path)
    assert not asked


def test_a_name_on_the_hub_without_its_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="needs huggingface_hub"):
        open_checkpoint("some/model")


@pytest.mark.parametrize("make", [one_file, beside_another_file, beside_an_index, sharded,
                                  beside_a_stale_shard, beside_another_index, of_links,
                                  named_by_its_config], ids=lambda make: make.__name__)  # fmt: skip
def test_the_files_are_those_that_transformers_loads(make, folder):
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "tiny-of-the-tests"

    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.up = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
            self.norm = torch.nn.LayerNorm(4, bias=False)
            self.post_init()

    make(folder)
    config = folder / "config.json"
    fields = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**fields, "model_type": Config.model_type}))
    for file in folder.glob("*.safetensors"):  # which it loads only with the format told
        tensors = load_file(file)
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
    model = Model.from_pretrained(folder)
    assert torch.equal(model.up.weight, weights()[NAME])
    assert open_checkpoint(folder).tensors[NAME].shape == SHAPE


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_target_of_another_dtype(dtype, folder, stock, tmp_path):
    """Its shape is known, its values are not: merging is refused, inspecting says so."""
    save_file({NAME: torch.ones(SHAPE).to(dtype)}, folder / "model.safetensors")
    assert by_load(folder, stock, tmp_path) == SHAPE
    (target,) = summarize(stock, open_checkpoint(folder)).targets
    assert (target.base, target.vanishing, target.shape) == ("cannot be told", None, SHAPE)
    with pytest.raises(MergeError, match="quantized"):
        by_merge(folder, stock, tmp_path)
    with pytest.raises(WrongBaseError, match="of floating point"):
        by_patches(folder, stock, tmp_path)


def test_a_base_of_another_shape_is_refused_by_every_door(folder, tmp_path):
    save_file(weights((4, 4)), folder / "model.safetensors")
    for path, form in ((tmp_path / "a.safetensors", "compact"), (tmp_path / "a", "peft")):
        made_for(weights()).save(path, format=form)
        for door in (by_load, by_summary, by_merge, by_patches):
            with pytest.raises(WrongBaseError, match="shape"):
                door(folder, path, tmp_path)


def test_k_values_are_read_and_not_the_tensor(tmp_path):
    """A checkpoint far larger than memory: a sparse file of 1 TiB, of zeros."""
    size = 2**19
    header = json.dumps(
        {NAME: {"dtype": "F32", "shape": [size, size], "data_offsets": [0, 4 * size**2]}}
    ).encode()
    base = tmp_path / "model.safetensors"
    base.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        with open(base, "r+b") as file:
            file.truncate(8 + len(header) + 4 * size**2)
    except OSError:
        pytest.skip("no sparse files of this size here")
    support = Support((size, size), torch.tensor([0, 5, size**2 - 1]))
    delta = SparseDelta(support, torch.ones(3))
    Adapter({NAME: delta}, fingerprint_fields({NAME: torch.zeros(3)})).save(tmp_path / "a")
    (target,) = summarize(tmp_path / "a", open_checkpoint(base)).targets
    assert (target.base, target.vanishing) == ("same", 0)
    assert torch.equal(source_of(base).entries(NAME, support.indices), torch.zeros(3))


def test_a_pickle_by_its_name(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK")
    with pytest.raises(FileFormatError, match="a pickle"):
        open_checkpoint(path)


@pytest.mark.parametrize("make", GOOD, ids=lambda make: make.__name__)
def test_a_merged_copy_holds_one_checkpoint(make, folder, stock, tmp_path):
    """Whatever else could be loaded from it would be the old weights."""
    make(folder)
    merge(stock, folder, tmp_path / "merged")
    base, merged = open_checkpoint(folder), open_checkpoint(tmp_path / "merged")
    assert [file.name for file in merged.files] == [file.name for file in base.files]
    names = {file.name for file in (tmp_path / "merged").glob("*.safetensors*")}
    assert names == {file.name for file in (*base.files, base.index) if file is not None}


def test_an_open_checkpoint_is_taken_as_it_is(folder, stock, tmp_path):
    one_file(folder)
    opened = open_checkpoint(folder)
    assert open_checkpoint(opened) is opened
    for door in PYTHON:
        assert tuple(door(opened, stock, tmp_path)) == SHAPE


def test_an_index_that_does_not_fit(tmp_path):
    tensors = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    checkpoint = write_checkpoint(tmp_path / "base", tensors)
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def refused(match, change):
        changed = json.loads(json.dumps(index))
        change(changed["weight_map"])
        path.write_text(json.dumps(changed))
        with pytest.raises(FileFormatError, match=match):
            open_checkpoint(checkpoint)

    first, second, _ = SHARDS
    refused("lists 'ghost' in .*, which lacks it", lambda m: m.update(ghost=first))
    refused("but it is in", lambda m: m.update({"model.norm.weight": second}))
    refused("no file beside the index", lambda m: m.update({"model.norm.weight": "../x"}))
    path.write_text('{"weight_map": {}}')
    with pytest.raises(FileFormatError, match="weight_map"):
        open_checkpoint(checkpoint)
    path.write_text(json.dumps(index))
    (checkpoint / second).unlink()
    with pytest.raises(FileNotFoundError):
        open_checkpoint(checkpoint)


def test_folders_without_an_index(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileFormatError, match="no safetensors checkpoint"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"a", "b"}
    save_file({"b": torch.zeros(2)}, tmp_path / "z.safetensors")
    with pytest.raises(FileFormatError, match=r"both y.safetensors and z.safetensors hold 'b'"):
        open_checkpoint(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"c"}
