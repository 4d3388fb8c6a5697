# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shira.delta import Adapter
from shira.errors import FileFormatError, ShiraError
from shira.store import load, read_peft

from . import hostile
from .hostile import HOSTILE, Hostile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hostile.write_sound(tmp_path / "adapter")


BASE = {hostile.PARAMETER: hostile.SHAPE, "head.weight": (3, 8)}


def base_for(kind: Hostile) -> dict[str, tuple[int, ...]] | None:
    return None if kind.name.startswith("shapes_") else BASE


def test_the_sound_folder_is_accepted(folder: Path) -> None:
    adapter = load(folder, base=BASE)
    assert adapter[hostile.PARAMETER].support.indices.tolist() == [5, 6, 9, 44]


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.name)
def test_load_names_file_tensor_and_cause(kind: Hostile, folder: Path) -> None:
    kind.spoil(folder)
    with pytest.raises(FileFormatError) as caught:
        load(folder, base=base_for(kind))
    message = str(caught.value)
    assert isinstance(caught.value, ShiraError)
    assert str(folder) in message
    assert kind.file in message or kind.name == "only_a_bin"
    assert kind.cause in message
    assert kind.tensor is None or kind.tensor in message
    assert len(message) < 1000


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.name)
def test_read_peft_refuses_all_that_needs_no_shapes(kind: Hostile, folder: Path) -> None:
    kind.spoil(folder)
    if kind.needs_shapes:
        assert read_peft(folder).tensors
    else:
        with pytest.raises(FileFormatError):
            read_peft(folder)


def test_without_shapes_the_error_asks_for_the_base(folder: Path) -> None:
    with pytest.raises(FileFormatError, match=r"base=model"):
        Adapter.load(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        load(tmp_path / "absent")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(folder: Path) -> None:
    (folder / hostile.WEIGHTS).unlink()
    os.mkfifo(folder / hostile.WEIGHTS)
    with pytest.raises(FileFormatError, match="not a regular file"):
        load(folder, base=BASE)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from shira.errors import FileFormatError
from shira.store import load
from tests.store.hostile import HOSTILE, write_sound
from tests.store.test_hostile import BASE, base_for
load(write_sound(Path(sys.argv[1]) / "warm"), base=BASE)
folders = []
for kind in HOSTILE:
    folder = write_sound(Path(sys.argv[1]) / kind.name)
    kind.spoil(folder)
    folders.append((kind, folder))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 32 * 2**20,) * 2)
for kind, folder in folders:
    try:
        load(folder, base=base_for(kind))
    except FileFormatError:
        continue
    raise SystemExit(f"{kind.name} was accepted")
print(len(folders))
"""

BOUNDED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from shira.store import load
small, large, growth = sys.argv[1:]
load(small)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(growth),) * 2)
try:
    print(load(large).nnz)
except MemoryError:
    print("out of memory")
except RuntimeError as error:  # torch's own, and C++'s bad_alloc
    print("out of memory" if "memory" in str(error) or "alloc" in str(error) else repr(error))
"""


def run(code: str, *args: object) -> str:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        # One arena: a second one would reserve 64 MiB of addresses that nobody uses.
        env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-500:]
    return done.stdout


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux_only
def test_no_claim_makes_the_reader_allocate(tmp_path: Path) -> None:
    """All hostile files again, in a process that may grow by 32 MiB."""
    assert int(run(LIMITED, tmp_path)) == len(HOSTILE)


@linux_only
def test_a_large_file_costs_at_most_ten_times_its_size(tmp_path: Path) -> None:
    import torch

    from shira.delta import SparseDelta
    from shira.support import Support

    def write(name: str, k: int) -> Path:
        indices = torch.arange(k) * 8 + torch.arange(k) % 8
        delta = SparseDelta(Support((8192, 4096), indices), torch.ones(k).bfloat16())
        Adapter({"a.weight": delta}).save(tmp_path / name)
        return tmp_path / name

    small, large = write("small", 8), write("large", 4_000_000)
    size = (large / hostile.WEIGHTS).stat().st_size
    assert run(BOUNDED, small, large, 10 * size + 32 * 2**20) == "4000000\n"
    assert run(BOUNDED, small, large, size) == "out of memory\n"  # so the limit does bite
