# SPDX-License-Identifier: Apache-2.0
"""Merging into a checkpoint on disk and back: bits, files, refusals, interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from shira import Adapter, ShiraError, SparseDelta, Support
from shira.base import fingerprint
from shira.checkpoints import entries, open_checkpoint
from shira.convert import merge, unmerge
from shira.errors import AdapterError, ConfigError, FileFormatError, MergeError, WrongBaseError
from shira.store import atomic
from tests.convert.conftest import SHARDS, applied, digests, load, make_adapter, write_checkpoint


def same(a, b):
    """Equal bit for bit, which torch.equal does not see of 0.0 and -0.0."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_as_merged_in_memory_and_back_to_the_same_bytes(
    checkpoint, tensors, adapter, tmp_path, scale
):
    told = merge(adapter, checkpoint, tmp_path / "out", scale=scale, undo=tmp_path / "undo")
    assert same(load(tmp_path / "out"), applied(tensors, adapter, scale))
    before, after = digests(checkpoint), digests(tmp_path / "out")
    first, second, third = SHARDS
    assert {name for name in before if before[name] != after[name]} == {first, second}
    assert before.keys() == after.keys()
    assert told.written.patched == (first, second)
    assert third in told.written.copied
    assert {target.base for target in told.targets} == {"same"}
    assert (told.nnz, len(told.targets)) == (adapter.nnz, 4)

    back = unmerge(tmp_path / "out", tmp_path / "undo", tmp_path / "back")
    assert digests(tmp_path / "back") == before
    assert back.entries <= adapter.nnz
    assert digests(checkpoint) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(({"scale": scale}, AdapterError) for scale in (float("nan"), float("inf"), True, "1")),
        *(({"max_lost": share}, ConfigError) for share in (float("nan"), -0.1, 2)),
    ],
)
def test_numbers_that_are_none_are_refused(checkpoint, adapter, tmp_path, options, error):
    with pytest.raises(error):
        merge(adapter, checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_headers_and_metadata_of_shards_stay(checkpoint, adapter, tmp_path):
    shard = checkpoint / next(iter(SHARDS))
    save_file(load_file(shard), shard, metadata={"format": "pt", "note": "kept"})
    merge(adapter, checkpoint, tmp_path / "out")
    old, new = shard.read_bytes(), (tmp_path / "out" / shard.name).read_bytes()
    header = 8 + int.from_bytes(old[:8], "little")
    assert old[:header] == new[:header]
    assert b'"note":"kept"' in new[:header]


def test_deltas_lost_to_rounding_are_counted(tmp_path):
    base = {"a.weight": torch.tensor([1.0, 1.0, 1.0, -0.0, 1.0]).bfloat16()}
    write_checkpoint(tmp_path / "base", base, {"model.safetensors": ["a.weight"]})
    values = torch.tensor([1e-3, 0.5, 0.0, 0.0, -1e-4])  # two too small, two that say nothing
    adapter = Adapter({"a.weight": SparseDelta(Support((5,), torch.arange(5)), values)})
    told = merge(adapter, tmp_path / "base", tmp_path / "out", undo=tmp_path / "undo")
    assert (told.nnz, told.nonzero, told.lost) == (5, 3, 2)
    merged = load(tmp_path / "out")["a.weight"]
    assert torch.equal(merged.float(), torch.tensor([1.0, 1.5, 1.0, 0.0, 1.0]))
    assert not torch.signbit(merged[3])  # -0.0 + 0.0, as in memory
    unmerge(tmp_path / "out", tmp_path / "undo", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_and_scattered_entries(dtype, tmp_path, monkeypatch):
    """Entries far apart and close together, over several windows, not aligned."""
    monkeypatch.setattr("shira.checkpoints.entries.WINDOW", 64)
    monkeypatch.setattr("shira.checkpoints.entries._GAP", 16)
    torch.manual_seed(0)
    base = {"pad": torch.ones(3, dtype=torch.uint8), "w": torch.randn(50, 40).to(dtype)}
    save_file(base, tmp_path / "one.safetensors")
    flat = torch.cat((torch.arange(100), torch.randperm(1900)[:60].sort().values + 100))
    adapter = Adapter({"w": SparseDelta(Support((50, 40), flat), torch.randn(160))})
    merge(adapter, tmp_path / "one.safetensors", tmp_path / "m.safetensors", undo=tmp_path / "u")
    assert same(load_file(tmp_path / "m.safetensors"), applied(base, adapter))
    unmerge(tmp_path / "m.safetensors", tmp_path / "u", tmp_path / "b.safetensors")
    one = (tmp_path / "one.safetensors").read_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == one


def test_empty_adapters_and_deltas(checkpoint, tensors, tmp_path):
    empty = SparseDelta(Support((8, 8), torch.empty(0, dtype=torch.int64)), torch.empty(0))
    for number, adapter in enumerate([Adapter({}), Adapter({"model.layers.0.q.weight": empty})]):
        out, undo = tmp_path / f"out{number}", tmp_path / f"undo{number}"
        assert merge(adapter, checkpoint, out, undo=undo).lost == 0
        assert digests(out) == digests(checkpoint)
        unmerge(out, undo, tmp_path / f"back{number}")


# Names


def test_a_prefix_more_or_less(checkpoint, tensors, tmp_path):
    adapter = make_adapter(tensors)
    more = Adapter({f"wrapped.{name}": delta for name, delta in adapter.items()})
    less = Adapter({name.removeprefix("model."): delta for name, delta in adapter.items()})
    for number, (other, words) in enumerate(
        [(more, "without"), (less, "with the prefix 'model.'")]
    ):
        told = merge(other, checkpoint, tmp_path / str(number))
        assert words in told.naming
        assert same(load(tmp_path / str(number)), applied(tensors, adapter))


def test_ambiguous_prefixes_are_refused(tmp_path):
    base = {"encoder.q.weight": torch.ones(4, 4), "decoder.q.weight": torch.ones(4, 4)}
    save_file(base, tmp_path / "both.safetensors")
    adapter = make_adapter({"q.weight": torch.ones(4, 4)}, ["q.weight"], k=2)
    with pytest.raises(WrongBaseError, match=r"2 ways.*'decoder.', or .*'encoder.'"):
        merge(adapter, tmp_path / "both.safetensors", tmp_path / "out.safetensors")


def test_a_missing_name_suggests(checkpoint, tensors, tmp_path):
    adapter = make_adapter(tensors)
    odd = Adapter({**adapter, "model.layers.1.upp.weight": adapter["model.layers.1.up.weight"]})
    with pytest.raises(
        WrongBaseError, match=r"1 of 5 are missing.*Did you mean 'model.layers.1.up"
    ):
        merge(odd, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tied(folder, tensors, **config):
    """A checkpoint without an output head."""
    write_checkpoint(
        folder,
        tensors,
        {"model.safetensors": [name for name in tensors if name != "lm_head.weight"]},
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tied_weights_are_refused_and_explained(tensors, tmp_path):
    folder = tied(tmp_path / "base", tensors, architectures=["LlamaForCausalLM"])
    with pytest.raises(MergeError, match=r"tied to 'model.embed_tokens.weight'"):
        merge(make_adapter(tensors, ["lm_head.weight"]), folder, tmp_path / "out")
    adapter = make_adapter(tensors, ["model.embed_tokens.weight"])
    with pytest.raises(MergeError, match=r"'model.embed_tokens.weight' is tied"):
        merge(adapter, folder, tmp_path / "out")
    (folder / "config.json").write_text('{"architectures": ["LlamaModel"]}')
    merge(adapter, folder, tmp_path / "out")  # a model without a head ties nothing
    apart = {**tensors, "own_head.weight": tensors["lm_head.weight"]}
    folder = tied(tmp_path / "apart", apart, architectures=["LlamaForCausalLM"])
    merge(adapter, folder, tmp_path / "out2")
    tied(tmp_path / "told", tensors, architectures=["XForCausalLM"], tie_word_embeddings=False)
    merge(adapter, tmp_path / "told", tmp_path / "out3")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("MambaForCausalLM", "backbone.embeddings.weight"),
        ("T5ForConditionalGeneration", "shared.weight"),
        ("BartForConditionalGeneration", "model.shared.weight"),
        ("XLNetLMHeadModel", "transformer.word_embedding.weight"),
        ("BertForPreTraining", "bert.embeddings.word_embeddings.weight"),
        ("GPT2DoubleHeadsModel", "transformer.wte.weight"),
    ],
)
def test_embeddings_of_any_name_that_a_head_shares(architecture, name, tensors, tmp_path):
    tensors = {name: tensors["model.embed_tokens.weight"]}
    words = len(tensors[name])
    for number, config in enumerate(
        ({"vocab_size": words}, {"text_config": {"vocab_size": words}})
    ):
        folder = tied(tmp_path / str(number), tensors, architectures=[architecture], **config)
        with pytest.raises(MergeError, match=f"'{name}' is tied"):
            merge(make_adapter(tensors, [name]), folder, tmp_path / "out")
        head = make_adapter({"lm_head.weight": tensors[name]}, ["lm_head.weight"])
        with pytest.raises(MergeError, match=f"it is tied to '{name}'"):
            merge(head, folder, tmp_path / "out")


# Refusals: nothing is written


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda t: t["model.layers.0.q.weight"].add_(1), WrongBaseError, "wrong base"),
        (
            lambda t: t.update({"model.layers.0.q.weight": t["model.layers.0.q.weight"][:4]}),
            WrongBaseError,
            r"has shape \(4, 8\)",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.q.weight": t["model.layers.0.q.weight"].to(torch.float8_e4m3fn)}
            ),
            MergeError,
            "dtype F8_E4M3: it is quantized",
        ),
        (
            lambda t: t.update({"model.layers.0.q.qweight": t.pop("model.layers.0.q.weight")}),
            MergeError,
            "is quantized: the checkpoint holds 'model.layers.0.q.qweight'",
        ),
    ],
)
def test_a_base_that_does_not_fit(tensors, tmp_path, spoil, error, match):
    adapter = make_adapter(tensors)
    spoil(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    folder = write_checkpoint(tmp_path / "base", tensors, {"model.safetensors": [*tensors]})
    with pytest.raises(error, match=match):
        merge(adapter, folder, tmp_path / "out", undo=tmp_path / "undo")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_another_base_if_the_caller_insists(checkpoint, tensors, adapter, tmp_path):
    prints = {**adapter.metadata["base_fingerprint"]}
    prints["model.layers.0.q.weight"] = prints["model.layers.1.q.weight"]
    odd = Adapter(adapter, {"base_fingerprint": prints, "base_model_name_or_path": "some/model"})
    with pytest.raises(WrongBaseError, match="trained on 'some/model'"):
        merge(odd, checkpoint, tmp_path / "out")
    told = merge(odd, checkpoint, tmp_path / "out", check_base=False)
    assert [t.base for t in told.targets].count("another") == 1


def test_fingerprints_of_other_dtypes(tmp_path):
    """One of a wider dtype cannot be compared, one of a narrower can."""
    torch.manual_seed(0)
    wide = torch.randn(8, 8)
    narrow = wide.bfloat16()
    flat = torch.arange(0, 64, 3)
    delta = SparseDelta(Support((8, 8), flat), torch.ones(len(flat)))

    def verdict(stored, trained_on):
        save_file({"w": stored}, tmp_path / "one.safetensors")
        adapter = Adapter(
            {"w": delta}, {"base_fingerprint": {"w": fingerprint(trained_on.view(-1)[flat])}}
        )
        out = tmp_path / "out.safetensors"
        return merge(adapter, tmp_path / "one.safetensors", out, overwrite=True).targets[0].base

    assert verdict(narrow, narrow.float()) == "same"  # loaded in float32
    assert verdict(wide, narrow) == "same after rounding"  # loaded in bfloat16
    assert verdict(narrow, wide) == "cannot be told"
    with pytest.raises(WrongBaseError):
        verdict(wide + 1, narrow)


def test_sums_too_large_for_the_dtype(tmp_path):
    save_file({"w": torch.full((2, 2), 6e4).half()}, tmp_path / "one.safetensors")
    delta = SparseDelta(Support((2, 2), torch.tensor([3])), torch.tensor([6e4]))
    with pytest.raises(MergeError, match="1 of 1 sums are too large for F16"):
        merge(Adapter({"w": delta}), tmp_path / "one.safetensors", tmp_path / "out.safetensors")


def test_outputs_that_would_destroy_something(checkpoint, adapter, tmp_path):
    def refused(match, output, **options):
        before = digests(tmp_path)
        with pytest.raises(ConfigError, match=match):
            merge(adapter, checkpoint, output, **options)
        assert digests(tmp_path) == before

    taken, other = tmp_path / "taken", tmp_path / "other"
    merge(adapter, checkpoint, taken)
    other.mkdir()
    (other / "thesis.tex").write_text("")
    refused("exists; overwrite it", taken)
    refused("a folder of something else", other, overwrite=True)
    refused("of another kind", other / "thesis.tex", overwrite=True)
    refused("is read here", checkpoint, overwrite=True)
    refused("lies in the checkpoint", checkpoint / "in", overwrite=True)
    refused("holds .*, which is read here", tmp_path, overwrite=True)
    refused("lies in the checkpoint", tmp_path / "out", undo=checkpoint / "undo")
    refused("undo file .* and output .* overlap", tmp_path / "out", undo=tmp_path / "out" / "undo")
    refused("undo file .* exists", tmp_path / "out", undo=other / "thesis.tex")


def test_overwriting_replaces_the_whole_folder(checkpoint, tensors, adapter, tmp_path):
    merge(adapter, checkpoint, tmp_path / "out")
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"")
    merge(adapter, checkpoint, tmp_path / "out", scale=2.0, overwrite=True)
    assert same(load(tmp_path / "out"), applied(tensors, adapter, 2.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_half_way_leaves_nothing(checkpoint, adapter, tmp_path, monkeypatch, overwrite):
    if overwrite:
        merge(adapter, checkpoint, tmp_path / "out")
    before = digests(tmp_path)
    write = merge.__globals__["rewrite"].__globals__["write_entries"]
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr("shira.checkpoints.entries.write_entries", fails)
    with pytest.raises(OSError, match="No space"):
        merge(adapter, checkpoint, tmp_path / "out", scale=3.0, overwrite=overwrite)
    assert digests(tmp_path) == before


def test_a_kernel_that_cannot_copy(checkpoint, tensors, adapter, tmp_path, monkeypatch):
    def cannot(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "copy_file_range", cannot, raising=False)
    merge(adapter, checkpoint, tmp_path / "out")
    assert same(load(tmp_path / "out"), applied(tensors, adapter))


# What comes along


def test_other_copies_of_the_weights_stay_behind(checkpoint, adapter, tmp_path):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (checkpoint / name).write_bytes(b"old weights")
    (checkpoint / "onnx").mkdir()
    (checkpoint / "onnx" / "model.onnx").write_bytes(b"old weights")
    (checkpoint / "2_Dense").mkdir()
    (checkpoint / "2_Dense" / "pytorch_model.bin").write_bytes(b"another part of the model")
    (checkpoint / ".git").mkdir()
    (checkpoint / ".git" / "HEAD").write_text("")
    told = merge(adapter, checkpoint, tmp_path / "out")
    left = {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", "onnx/model.onnx"}
    assert set(told.written.left_out) == left | {".git"}
    there = digests(tmp_path / "out").keys()
    assert digests(checkpoint).keys() - there == left | {".git/HEAD"}
    assert {"tokenizer.json", "1_Pooling/config.json", "2_Dense/pytorch_model.bin"} <= there


def test_links_are_followed_and_read_only_files_written(checkpoint, tensors, adapter, tmp_path):
    """As a download cache lays them out."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file():
            path.chmod(0o444)
            (snapshot / path.name).symlink_to(path)
    merge(adapter, snapshot, tmp_path / "out")
    assert same(load(tmp_path / "out"), applied(tensors, adapter))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert same(load(checkpoint), tensors)


def test_progress_reaches_the_end(checkpoint, adapter, tmp_path):
    seen = []
    told = merge(adapter, checkpoint, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen[-1] == (told.written.size, told.written.size)
    assert seen == sorted(seen)


# Undo files of others


def test_an_undo_file_of_another_merge(checkpoint, tensors, adapter, tmp_path):
    merge(adapter, checkpoint, tmp_path / "out", undo=tmp_path / "undo")
    merge(adapter, checkpoint, tmp_path / "out2", undo=tmp_path / "undo2", scale=2.0)
    for wrong in (tmp_path / "out2", checkpoint):
        with pytest.raises(WrongBaseError, match="does not hold what the merge of"):
            unmerge(wrong, tmp_path / "undo", tmp_path / "back")
    shutil.copytree(tmp_path / "out", tmp_path / "one")
    (tmp_path / "one" / "model.safetensors.index.json").unlink()
    whole = load(tmp_path / "one")
    for shard in SHARDS:
        (tmp_path / "one" / shard).unlink()
    save_file(whole, tmp_path / "one" / "model.safetensors")
    unmerge(tmp_path / "one", tmp_path / "undo", tmp_path / "back")  # of one file, any name will do
    assert same(load(tmp_path / "back"), tensors)


@pytest.mark.parametrize("position", [0, 8, 40, 300, -30, -1])
def test_a_damaged_undo_file(checkpoint, adapter, tmp_path, position):
    """Whatever byte is wrong, it is refused, or (within the originals) it is only that value."""
    merge(adapter, checkpoint, tmp_path / "out", undo=tmp_path / "undo")
    raw = bytearray((tmp_path / "undo").read_bytes())
    raw[position] ^= 0xFF
    (tmp_path / "undo").write_bytes(raw)
    try:
        unmerge(tmp_path / "out", tmp_path / "undo", tmp_path / "back")
    except ShiraError:
        assert not (tmp_path / "back").exists()
    (tmp_path / "undo").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FileFormatError):
        unmerge(tmp_path / "out", tmp_path / "undo", tmp_path / "back", overwrite=True)
    adapter.save(tmp_path / "adapter", format="peft")
    with pytest.raises(FileFormatError, match="not an undo file"):
        unmerge(
            tmp_path / "out", tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "b"
        )


# Adapters from files


def test_an_adapter_of_stock_peft_learns_shapes_from_the_checkpoint(
    checkpoint, tensors, adapter, tmp_path
):
    adapter.save(tmp_path / "adapter", format="peft")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["shira_shapes"], config["base_fingerprint"]
    path.write_text(json.dumps(config))
    assert Adapter.load(tmp_path / "adapter", base=open_checkpoint(checkpoint)) == adapter
    told = merge(tmp_path / "adapter", checkpoint, tmp_path / "out")
    assert {target.base for target in told.targets} == {"not recorded"}
    assert same(load(tmp_path / "out"), applied(tensors, adapter))


def dies_at(step):
    """From here on this process kills itself before the given step of writing."""
    taken = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for module, name in [
        (os, "open"),
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (atomic, "_exchange"),
        (entries, "write_entries"),
    ]:
        setattr(module, name, counted(getattr(module, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_killed_at_any_step_the_old_folder_or_the_new_one_is_there(tmp_path, exchange):
    torch.manual_seed(0)
    tensors = {name: torch.randn(8, 8) for name in ("a.weight", "b.weight")}
    shards = {"x.safetensors": ["a.weight"], "y.safetensors": ["b.weight"]}
    base = write_checkpoint(tmp_path / "base", tensors, shards)
    adapter, out = make_adapter(tensors, [*tensors]), tmp_path / "out"
    undo = tmp_path / "undo"
    merge(adapter, base, out, undo=undo)
    old, found = digests(out), []
    for step in range(1, 100):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                if not exchange:
                    atomic._exchange = lambda a, b: False
                dies_at(step)
                merge(adapter, base, out, scale=2.0, undo=undo, overwrite=True)
                os._exit(0)
            os._exit(1)
        status = os.waitpid(child, 0)[1]
        if not out.exists():  # between two renames: both are there under names beside it
            assert not exchange
            whole = [digests(path) for path in tmp_path.glob(".out.*")]
            assert old in whole
        else:
            now = digests(out)
            found.append(now == old)
            if not found[-1]:
                assert same(load(out), applied(tensors, adapter, 2.0))
            unmerge(out, undo, tmp_path / "back", overwrite=True)
            assert digests(tmp_path / "back") == digests(base)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        merge(adapter, base, out, undo=undo, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "back") == [
            "base",
            "out",
            "undo",
        ]
    else:
        pytest.fail("it never ended")
    assert found.count(True) > 10
    assert not found[-1]


def test_an_undo_file_stays_as_long_as_its_checkpoint(checkpoint, adapter, tmp_path, monkeypatch):
    out, undo = tmp_path / "out", tmp_path / "undo"
    merge(adapter, checkpoint, out, undo=undo)
    before = undo.read_bytes()

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shira.checkpoints.entries.write_entries", fails)
    with pytest.raises(OSError, match="No space"):
        merge(adapter, checkpoint, out, scale=2.0, undo=undo, overwrite=True)
    assert undo.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "undo"]
