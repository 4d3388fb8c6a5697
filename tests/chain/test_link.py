# SPDX-License-Identifier: Apache-2.0
"""Links that nobody should accept, each wrong in one way, with everything else as it should be."""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from shira import chain
from shira.chain.link import checkpoint_hash, open_link
from shira.errors import FileFormatError
from tests.chain.checkpoints import changed, contents, random_tensor, write


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two checkpoints and their link, taken apart: metadata, data, table."""
    folder = tmp_path_factory.mktemp("link")
    rng = np.random.default_rng(0)
    old = {name: random_tensor(rng, "F32", [8, 8]) for name in "abc"}
    new = {"a": changed(rng, old["a"], 0.1), "b": old["b"], "d": random_tensor(rng, "BF16", [4])}
    write(folder / "old", {"model.safetensors": old}, **{"x.txt": "x"})
    write(folder / "new", {"model.safetensors": new}, **{"x.txt": "y", "z.txt": "z"})
    chain.diff(folder / "old", folder / "new", folder / "link")
    raw = (folder / "link").read_bytes()
    header = json.loads(raw[8:1024])
    data, table = (raw[1024:][slice(*header[n]["data_offsets"])] for n in ("data", "table"))
    return folder, header["__metadata__"], data, json.loads(zlib.decompress(table))


def written(path: Path, metadata, data: bytes, table, *, renew: bool = True) -> Path:
    """The link with these parts; its hashes are renewed if its table still has tensors."""
    raw = table if isinstance(table, bytes) else zlib.compress(json.dumps(table).encode())
    metadata = dict(metadata)
    if renew and isinstance(table, dict):
        tensors = table["tensors"].items()
        before = {k: c.get("was", c["hash"]) for k, c in tensors}
        before = {k: h for k, h in before.items() if h is not None} | table["gone"]
        metadata["old"] = checkpoint_hash(before)
        metadata["new"] = checkpoint_hash({k: c["hash"] for k, c in tensors})
    metadata["checksum"] = hashlib.sha256(data + raw).hexdigest()[:32]
    ends = [0, len(data), len(data) + len(raw)]
    header = {"__metadata__": metadata} | {
        name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}
        for name, a, b in zip(("data", "table"), ends, ends[1:], strict=False)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + raw)
    return path


def test_the_sound_one_written_again_is_taken(sound, tmp_path):
    folder, metadata, data, table = sound
    link = written(tmp_path / "link", metadata, data, table)
    chain.apply(folder / "old", link, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder / "new")


HEADER = '{"a":{"dtype":"F32","shape":[8,8],"data_offsets":[0,256]}'
SPOILED = {
    "a file outside": (lambda t: t["files"].update({"../x": "{}"}), "no file inside a folder"),
    "an absolute file": (lambda t: t["others"].update({"/x": {}}), "no file inside a folder"),
    "a file of Windows'": (lambda t: t["others"].update({"C:x": {}}), "no file inside a folder"),
    "a backslash": (lambda t: t["others"].update({"..\\x": {}}), "no file inside a folder"),
    "the folder itself": (lambda t: t["others"].update({".": {}}), "no file inside a folder"),
    "no name": (lambda t: t["others"].update({"": {}}), "no file inside a folder"),
    "dropped outside": (lambda t: t["dropped"].append("../x"), "no file inside a folder"),
    "dropped number": (lambda t: t["dropped"].append(3), "no file inside a folder"),
    "one name twice": (
        lambda t: t["others"].update({"model.safetensors": t["others"]["x.txt"]}),
        "two files are of one name",
    ),
    "a file in a file": (
        lambda t: t["others"].update({"x.txt/y": t["others"]["z.txt"]}),
        "is a file and a folder",
    ),
    "no header": (lambda t: t["files"].update({"model.safetensors": 3}), "is a text"),
    "a header of something else": (
        lambda t: t["files"].update({"model.safetensors": "[]"}),
        "JSON object",
    ),
    "tensors that overlap": (
        lambda t: t["files"].update(
            {"model.safetensors": HEADER + ',"b":' + HEADER.split(":", 1)[1] + "}"}
        ),
        "overlap",
    ),
    "a size unlike its shape": (
        lambda t: t["files"].update({"model.safetensors": HEADER.replace("256", "255") + "}"}),
        "takes 256 bytes",
    ),
    "tensors of two files": (
        lambda t: t["files"].update({"more.safetensors": t["files"]["model.safetensors"]}),
        "two files hold 'a'",
    ),
    "a tensor not listed": (lambda t: t["tensors"].pop("b"), "'b' is in the headers or in"),
    "a tensor gone and there": (lambda t: t["gone"].update(b="0" * 32), "'b' is gone and there"),
    "pieces too few": (lambda t: t["tensors"]["a"].update(pieces=[]), "has 0 pieces"),
    "pieces too many": (lambda t: t["tensors"]["a"]["pieces"].append(0), "has 2 pieces"),
    "a piece below nothing": (lambda t: t["tensors"]["a"].update(pieces=[-1]), "longer than a"),
    "a piece too long": (lambda t: t["tensors"]["a"].update(pieces=[2**40]), "longer than a"),
    "a piece of truth": (lambda t: t["tensors"]["a"].update(pieces=[True]), "are lengths"),
    "pieces that are less": (lambda t: t["tensors"]["a"].update(pieces=[3]), "not all of the data"),
    "a hash of other kind": (lambda t: t["tensors"]["a"].update(hash="0" * 31), "32 hex digits"),
    "on what is not there": (lambda t: t["tensors"]["a"].update({"from": "x"}), "which there is"),
    "on a number": (lambda t: t["tensors"]["a"].update({"from": 3}), "the name of a tensor"),
    "changed, but not how": (lambda t: t["tensors"]["b"].update(was="0" * 32), "but not how"),
    "new without pieces": (lambda t: t["tensors"]["d"].pop("pieces"), "has no pieces"),
    "new with a piece as it was": (
        lambda t: t["tensors"]["d"].update(pieces=[0]),
        "a piece of it is as it was",
    ),
    "more to be told": (lambda t: t["tensors"]["a"].update(more=1), "'a' has"),
    "a size of a file": (lambda t: t["others"]["x.txt"].update(size=-1), "has a size"),
    "a huge file": (lambda t: t["others"]["x.txt"].update(size=2**61), "has 1 pieces"),
    "no folder": (lambda t: t.update(folder=False), "a single file is one"),
    "a part missing": (lambda t: t.pop("gone"), "it has folder"),
    "a part of another kind": (lambda t: t.update(dropped={}), "it has folder"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_table_that_is_wrong_is_refused(sound, tmp_path, name):
    folder, metadata, data, table = sound
    table = copy.deepcopy(table)
    spoil, says = SPOILED[name]
    spoil(table)
    with_hashes = not {"gone"} - table.keys()
    link = written(tmp_path / "link", metadata, data, table, renew=with_hashes)
    for use in (
        lambda: chain.apply(folder / "old", link, tmp_path / "out"),
        lambda: chain.verify(link),
    ):
        with pytest.raises(FileFormatError, match=says) as refused:
            use()
        assert str(link) in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]


def test_a_tensor_on_one_of_another_shape_is_refused(sound, tmp_path):
    folder, metadata, data, table = sound
    table = copy.deepcopy(table)
    table["tensors"]["d"]["from"] = "a"
    link = written(tmp_path / "link", metadata, data, table)
    with pytest.raises(FileFormatError, match="'d' is of another dtype or shape than 'a'"):
        chain.apply(folder / "old", link, tmp_path / "out")


def test_changes_of_nothing_are_refused(sound, tmp_path):
    folder, metadata, data, table = sound
    table = copy.deepcopy(table)
    table["tensors"]["a"]["from"] = None
    link = written(tmp_path / "link", metadata, data, table)
    with pytest.raises(FileFormatError, match="'a': it stands on a tensor, but names none"):
        chain.apply(folder / "old", link, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_links_are_refused(sound, tmp_path):
    _, metadata, data, table = sound
    link = tmp_path / "link"
    for wrong, says in (
        ({**metadata, "format": "pt"}, "no link of a chain"),
        ({**metadata, "version": "2"}, "version '2' of links is not known"),
    ):
        written(link, wrong, data, table)
        with pytest.raises(FileFormatError, match=says), open_link(link):
            pass
    written(link, {**metadata, "old": "0" * 32}, data, table, renew=False)
    with pytest.raises(FileFormatError, match="not those of the metadata"), open_link(link):
        pass
    link.write_bytes(link.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="truncated"), open_link(link):
        pass


def test_a_table_that_inflates_without_end_is_refused(sound, tmp_path):
    _, metadata, data, _ = sound
    link = written(tmp_path / "link", metadata, data, zlib.compress(b" " * 10**8, 9))
    with pytest.raises(FileFormatError, match="longer than 8388608 bytes"), open_link(link):
        pass
    written(link, metadata, data, b"no zlib")
    with pytest.raises(FileFormatError, match="cannot be inflated"), open_link(link):
        pass


def test_data_of_another_link_are_told_by_the_checksum(sound, tmp_path):
    _, metadata, data, table = sound
    link = written(tmp_path / "link", metadata, data, table)
    assert chain.verify(link).links == 1
    raw = link.read_bytes()
    at = raw.index(data) + 3
    link.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(FileFormatError, match="checksum"):
        chain.verify(link)
