# SPDX-License-Identifier: Apache-2.0
"""What reading may take: 10 x the size of the file, in a process that cannot take more."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.masks import random_support
from tests.hostile import compact_files, peft_files

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Each path is loaded by a child of its own, whose address space may grow by so much.
CHILDREN = """
import json, os, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from shira.errors import ShiraError
from shira import Adapter

warm, cases = json.loads(sys.argv[1])
for path in warm:
    Adapter.load(path)
sys.stdout.flush()
for path, growth, base in cases:
    if os.fork() == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + growth,) * 2)
        try:
            said = f"loaded {Adapter.load(path, base=base).nnz}"
        except ShiraError as error:
            said = str(error)
        except MemoryError:
            said = "out of memory"
        except RuntimeError as error:  # torch's own, and C++'s bad_alloc
            said = repr(error)
            said = "out of memory" if "memory" in said or "alloc" in said else said
        print(json.dumps([path, growth, said]), flush=True)
        os._exit(0)
    os.wait()
"""
SLACK = 16 * 2**20  # what the interpreter, torch and the allocator take by the way


def outcomes(warm: list[Path], cases: list[tuple[Path, int, dict[str, Any] | None]]) -> list[str]:
    """What loading each path led to, in a process that may grow by so many bytes."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "src"), *filter(None, sys.path)])
    given = [list(map(str, warm)), [(str(file), growth, base) for file, growth, base in cases]]
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, json.dumps(given)],
        # One arena: a second one would reserve 64 MiB of addresses that nobody uses.
        env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[:2] for line in said] == [[str(file), growth] for file, growth, _ in cases]
    return [line[2] for line in said]


def test_no_claim_makes_the_reader_allocate(tmp_path: Path) -> None:
    """Every hostile file, whatever it claims, costs less than the slack."""
    from tests.hostile.test_peft_files import base_for

    cases: list[tuple[Path, int, dict[str, Any] | None]] = []
    for peft in peft_files.HOSTILE:
        folder = peft_files.write_sound(tmp_path / peft.name)
        peft.spoil(folder)
        cases.append((folder, 2 * SLACK, base_for(peft)))
    for compact in compact_files.HOSTILE:
        path = tmp_path / f"{compact.name}.safetensors"
        path.write_bytes(compact.spoil())
        cases.append((path, 2 * SLACK, None))
    warm = compact_files.write_sound(tmp_path / "warm.safetensors")
    for (path, _, _), said in zip(cases, outcomes([warm], cases), strict=True):
        assert said.startswith(str(path)), f"{path.name}: {said}"


def test_a_large_file_costs_at_most_ten_times_its_size(tmp_path: Path) -> None:
    k = 2_000_000
    support = random_support((8192, 4096), k, seed=1, name="a.weight")
    metadata = {"mask_type": "random", "random_seed": 1}
    adapter = Adapter({"a.weight": SparseDelta(support, torch.ones(k))}, metadata)
    folder = tmp_path / "peft"
    adapter.save(folder, "peft", torch.bfloat16)
    sizes = {folder: (folder / peft_files.WEIGHTS).stat().st_size}
    for dtype, indices in (("bfloat16", "gaps"), ("int8", "gaps"), ("int8", "seed")):
        path = tmp_path / f"{dtype}-{indices}.safetensors"
        adapter.save(path, dtype=getattr(torch, dtype), indices=indices)
        sizes[path] = path.stat().st_size
        spoilt = tmp_path / f"{dtype}-{indices}-spoilt.safetensors"
        raw = path.read_bytes()
        spoilt.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        sizes[spoilt] = len(raw)
    generous = [(path, 10 * size + SLACK, None) for path, size in sizes.items()]
    tight = [(path, size, None) for path, size in sizes.items()]  # so the limit does bite
    warm = compact_files.write_sound(tmp_path / "warm.safetensors")
    said = outcomes([warm], generous + tight)
    for (path, _, _), answer in zip(generous, said, strict=False):
        assert ("damaged" in answer) if "spoilt" in path.name else answer == f"loaded {k}", path
    assert said[len(sizes) :] == ["out of memory"] * len(sizes)


def test_a_header_full_of_objects_is_not_made(tmp_path: Path) -> None:
    """Three bytes of JSON can make sixty in memory: counted before they are made."""
    texts = {
        "lists": b'{"a":[' + b"[]," * 2_000_000 + b"0]}",
        "objects": b'{"a":[' + b'{"":0},' * 1_000_000 + b"0]}",
        "wide": b'{"__metadata__":{"shira":"' + b"\\ud83d\\ude00" * 300_000 + b'"}}',
    }
    cases: list[tuple[Path, int, None]] = []
    for name, text in texts.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        cases.append((path, 10 * len(text) + SLACK // 2, None))
    warm = compact_files.write_sound(tmp_path / "warm.safetensors")
    lists, objects, wide = outcomes([warm], cases)
    assert "too large" in lists
    assert "too large" in objects
    assert "shira_crc32" in wide
