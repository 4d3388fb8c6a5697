# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shira.errors import ConfigError
from shira.store import atomic
from shira.store.atomic import replacing, write_atomically
from shira.store.names import WEIGHTS_NAME

SOURCE = Path(atomic.__file__)

# atomic.py needs the standard library, shira.errors and a name. The package around it would import
# torch, which takes a second: these children start without.
CHILD = f"""
import importlib.util, os, signal, sys, types
sys.path.insert(0, {str(SOURCE.parents[2])!r})
for name in ("shira.store", "shira.store.names"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["shira.store.names"].WEIGHTS_NAME = {WEIGHTS_NAME!r}
spec = importlib.util.spec_from_file_location("atomic", {str(SOURCE)!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
assert "torch" not in sys.modules
path, size = sys.argv[1], int(sys.argv[2])
"""

KILL_AT_CALL = (
    CHILD
    + """
left = int(sys.argv[3])

def dying(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

for name in ("open", "fsync", "replace", "close", "chmod"):
    setattr(os, name, dying(getattr(os, name)))
atomic.write_atomically(path, b"n" * size)
print("done")
"""
)

WRITE_FOREVER = (
    CHILD
    + """
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        atomic.write_atomically(path, letter * size)
"""
)

needs_sigkill = pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
SIZE = 3_000_000


@needs_sigkill
def test_killed_before_each_call_it_makes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    outcomes = []
    for moment in range(1, 20):
        path.write_bytes(b"o" * SIZE)
        done = subprocess.run(
            [sys.executable, "-c", KILL_AT_CALL, path, str(SIZE), str(moment)],
            capture_output=True,
            text=True,
        )
        content = path.read_bytes()
        assert content in (b"o" * SIZE, b"n" * SIZE)
        outcomes.append((content[:1], done.stdout))
        if done.stdout:
            break
        assert done.returncode == -9, done.stderr
    killed = [letter for letter, said in outcomes if not said]
    assert outcomes[-1] == (b"n", "done\n")
    assert killed.count(b"o") >= 3
    assert killed.count(b"n") >= 2  # after the replacing, while the folder is flushed


@needs_sigkill
def test_killed_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for moment in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, path, str(SIZE)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(moment * 0.0037)
        child.kill()
        child.wait()
        child.stdout.close()
        content = path.read_bytes()
        assert content in (b"a" * SIZE, b"b" * SIZE)


KILL_AN_ADAPTER = """
import os, signal, sys, torch
torch.set_num_threads(1)
from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.support import Support

def adapter(seed):
    k = 1000 * seed
    values = torch.randn(k, generator=torch.Generator().manual_seed(seed))
    return Adapter({"a.weight": SparseDelta(Support((100, 100), torch.arange(k)), values)})

old, new, path, format = adapter(1), adapter(2), sys.argv[1], sys.argv[2]
outcomes = []
for moment in range(1, 60):
    old.save(path, format)
    child = os.fork()
    if child == 0:
        left = moment
        for name in ("open", "fsync", "replace", "close", "chmod"):
            def dying(*args, call=getattr(os, name), **kwargs):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            setattr(os, name, dying)
        new.save(path, format)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    read = Adapter.load(path)
    assert read in (old, new), moment
    outcomes.append("new" if read == new else "old")
    if status == 0:
        break
print(*outcomes)
"""


@needs_sigkill
@pytest.mark.parametrize(("format", "after"), [("peft", 8), ("compact", 3)])
def test_an_adapter_is_the_old_one_or_the_new_one(tmp_path: Path, format: str, after: int) -> None:
    source = str(SOURCE.parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILL_AN_ADAPTER, str(tmp_path / "adapter"), format],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([source, *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = done.stdout.split()
    assert outcomes.count("old") >= 3
    # Of PEFT's format also: killed while the config was being written, after the weights.
    assert outcomes.count("new") >= after
    assert outcomes == sorted(outcomes, reverse=True)


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="permissions and links of POSIX")
def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    plain, link = tmp_path / "plain", tmp_path / "link"
    write_atomically(plain, b"1")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(plain.stat().st_mode) == 0o666 & ~umask
    plain.chmod(0o640)
    link.symlink_to(plain)
    write_atomically(link, b"2")
    assert link.is_symlink()
    assert plain.read_bytes() == b"2"
    assert stat.S_IMODE(plain.stat().st_mode) == 0o640


HOLD = (
    CHILD
    + """
with atomic.replacing(path, folder=size == 0) as temporary:
    if size == 0:
        (temporary / "part").write_bytes(b"part")
    print(temporary, flush=True)
    sys.stdin.readline()
"""
)


@needs_sigkill
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "it"
    (tmp_path / ".other.0123456789abcdef.tmp").touch()

    def start() -> tuple[subprocess.Popen[str], Path]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, target, "0" if folder else "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        return child, Path(child.stdout.readline().strip())

    dead, left = start()
    live, used = start()
    dead.kill()
    dead.communicate()
    assert left.exists()
    with replacing(target, folder=folder):
        assert not left.exists()
        assert used.exists()  # its process is still writing
    live.communicate("go on\n")
    assert live.returncode == 0
    assert (target / "part").exists() or not folder
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".other.0123456789abcdef.tmp", "it"]


def test_two_that_write_at_once_remove_nothing_of_each_other(tmp_path: Path) -> None:
    child = """
for _ in range(60):
    atomic.write_atomically(path, b"x" * size)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD + child, tmp_path / "file", "10"])
        for _ in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError, match=r"pipe.*a pipe, a device or a socket"):
            write_atomically(tmp_path / name, b"new")
    with pytest.raises(ConfigError, match="is a folder"):
        write_atomically(tmp_path / "folder", b"new")
    with pytest.raises(ConfigError, match="is a file"), replacing(tmp_path / "file", folder=True):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link", "pipe"]


def test_folders_are_exchanged_where_the_system_cannot_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with replacing(tmp_path / "out", folder=True) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_the_old_folder_is_put_back_if_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OSError, match="gone"), replacing(tmp_path / "out", folder=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_what_was_killed_between_two_renames_is_put_back_before_anything_else(
    tmp_path: Path,
) -> None:
    old = tmp_path / ".out.0123456789abcdef.old"
    old.mkdir()
    (old / "old").touch()
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "out", folder=True):
        raise OSError("full")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "out"]
