# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on: processor, memory, versions. Never a host or user name."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "safetensors", "peft", "transformers", "accelerate")


def describe() -> dict[str, Any]:
    """Hardware, versions and how busy the machine was, as plain JSON values."""
    from shira._version import __version__

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "cuda_device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        # Above the number of cores, other work was running too: trust the ratios, not the seconds.
        "load_average_at_start": round(os.getloadavg()[0], 2)
        if hasattr(os, "getloadavg")
        else None,
        "versions": {
            "python": platform.python_version(),
            "shira": __version__,
            **{package: _version(package) for package in PACKAGES},
        },
    }


class Neighbours:
    """What share of the machine's processor time others took since this was made.

    With every core contended, threads of one process wait for each other at each parallel region,
    and runs with many small operations suffer most: figures of a busy machine are worth little.
    """

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """Between 0 and 1; None where the system does not tell."""
        now = self._read()
        if self._start is None or now is None or now[0] <= self._start[0]:
            return None
        total, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return min(1.0, max(0.0, (busy - own) / total))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds of all cores, of those busy, and of this process and those it waited for."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        ticks = [int(field) for field in line.split()[1:9]]
        seconds = [tick / os.sysconf("SC_CLK_TCK") for tick in ticks]
        idle = seconds[3] + seconds[4]
        return sum(seconds), sum(seconds) - idle, time.process_time() + sum(os.times()[2:4])


def _cpu_model() -> str:
    """The processor's own name, with the vector extensions that decide how fast a GEMM is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    name = fields.get("model name", platform.machine())
    flags = set(fields.get("flags", "").split())
    best = next((f for f in ("amx_tile", "avx512f", "avx2", "avx") if f in flags), None)
    return f"{name} ({best})" if best else name


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
