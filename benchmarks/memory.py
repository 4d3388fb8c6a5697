# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step, measured in two independent ways.

**Resident set** (``rss``): what the operating system sees, scratch of BLAS and custom kernels
included. Linux keeps the highest resident set of a process (VmHWM) and resets it when "5" is
written to ``/proc/self/clear_refs``, so no spike falls between two looks, as it may when the size
is sampled. The kernel's counters are right to about half a MiB. Null where there is no such file.

**Allocator** (``allocator``): the peak of the running sum of torch's own allocations and frees,
from ``torch.profiler`` with ``profile_memory=True``. Repeatable to the byte, but blind to memory
that did not come from torch's allocator.

What makes the resident set trustworthy:

- each contender has a process of its own, so no other's freed memory is there to be used again;
- ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` are set to 64 KiB, which gives every
  larger tensor a mapping of its own that goes back at once when it is freed (glibc would otherwise
  raise its threshold to 32 MiB and keep freed blocks, and the peak would depend on their order);
- a small model of the same kind takes two steps first, so that imports on first use, thread pools
  and library scratch are not counted as the step's.

Three figures come out, all in bytes:

- ``resident``: what the adapter adds to the loaded base before any step, once both have done a
  forward (values, indices, caches);
- ``step``: the peak within the second and third step, optimizer included, above what was resident
  when that step began (after the first step, so with the optimizer's state);
- ``over_base``: the peak of everything, first step included, above the loaded base. What somebody
  who has the base in memory needs besides in order to train.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders
from benchmarks.contenders import Contender, Workload

_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_CPU = 0  # torch's number for this type of device in a trace


def measure_apart(name: str, work: Workload) -> dict[str, Any]:
    """Measure one contender in a new process; the result of :func:`measure`."""
    root = Path(__file__).parent.parent
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name, json.dumps(asdict(work))],
        env={**os.environ, **_THRESHOLDS, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, work: Workload) -> dict[str, Any]:
    """Build one contender and take three steps: ``resident``, ``step``, ``over_base``, in bytes."""
    _warm_up(name, work)
    base = contenders.base_model(work)
    inputs = contenders.batch(work)
    with torch.no_grad():
        base(**inputs)
    before = settled_rss()
    contender = contenders.build(name, base, work)
    contenders.fill(contender)
    with torch.no_grad():
        contender.forward(inputs)
    after = settled_rss()

    _train(contender, inputs)
    highest = _peak_rss()
    steps = []
    for _ in range(2):
        start = settled_rss()
        _train(contender, inputs)
        peak = _peak_rss()
        if start is not None and peak is not None and highest is not None:
            steps.append(peak - start)
            highest = max(highest, peak)
    allocator = allocator_peak(lambda: _train(contender, inputs))
    return {
        "rss": {
            "resident": _minus(after, before),
            "step": max(steps, default=None),
            "over_base": _minus(highest, before),
        },
        "allocator": {"step": allocator},
    }


def _train(contender: Contender, inputs: dict[str, Any]) -> None:
    contender.forward(inputs).backward()
    contender.update()
    inputs["inputs_embeds"].grad = None


def _warm_up(name: str, work: Workload) -> None:
    small = replace(
        work, layers=1, hidden=64, intermediate=96, heads=2, vocab=64, batch=1, tokens=16
    )
    contender = contenders.build(name, contenders.base_model(small), small)
    inputs = contenders.batch(small)
    for _ in range(2):
        _train(contender, inputs)
    allocator_peak(lambda: _train(contender, inputs))


def allocator_peak(run: Any) -> int:
    """The highest running sum, in bytes, of torch's CPU allocations minus frees in ``run()``.

    Frees of what was allocated before are not counted: the profiler does not know their size.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == _CPU
    ]
    total = highest = 0
    for _, size in sorted(
        changes, key=lambda change: change[0]
    ):  # stable: keeps order at equal times
        total += size
        highest = max(highest, total)
    return highest


def settled_rss() -> int | None:
    """The resident set in bytes after collecting garbage and giving free memory back, with the
    record of its highest value reset to it. None where the system cannot tell."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    try:
        _CLEAR_REFS.write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _peak_rss() -> int | None:
    """The highest resident set in bytes since the last :func:`settled_rss`."""
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(match.group(1)) * 1024


def _minus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Workload(**json.loads(sys.argv[2])))))
