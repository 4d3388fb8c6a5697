# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shira.store import atomic
from shira.store.atomic import write_atomically

SOURCE = Path(atomic.__file__)

# atomic.py needs the standard library only, so these children start without torch.
CHILD = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("atomic", {str(SOURCE)!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
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

for name in ("open", "fsync", "replace", "close", "chmod", "fdopen"):
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
from shira.delta import Adapter, SparseDelta
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
        for name in ("open", "fsync", "replace", "close", "chmod", "fdopen"):
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
