# SPDX-License-Identifier: Apache-2.0
"""The least time that the weight gradient at single entries can take on this machine.

Each of the k entries is a dot product over the tokens. One operand of it can stay in registers for
a row of entries, the other must come from the cache: 4 bytes for each token and entry. That takes
``4 k T / cache bandwidth`` or ``2 k T / peak arithmetic``, whichever is longer. Both operands must
besides be read from memory once: ``(m + n) T * itemsize / memory bandwidth``.

All three rates are measured: reading half of the second-level cache and 64 MiB a thread with
``roofline.c``, and torch's own matrix product in float32.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from shira.ops import native

SOURCE = Path(__file__).with_name("roofline.c")
STREAMED = 64 * 2**20


class Rates(NamedTuple):
    """Of all threads together."""

    cache_bytes: float
    """A second, from the second-level cache."""
    memory_bytes: float
    flops: float


def highest(*measured: Rates) -> Rates:
    """The highest of each."""
    return Rates(*map(max, zip(*measured, strict=True)))


def measure() -> Rates:
    """The rates of this machine with as many threads as torch has."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofline.so"
        compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
        # no -ffast-math: a library linked with it turns subnormal numbers off for the whole process
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp"]
        made = ["-shared", "-fPIC", str(SOURCE), "-o", str(library)]
        subprocess.run([compiler, *flags, *made], check=True, capture_output=True)
        read = ctypes.CDLL(str(library)).read_all
        read.restype = ctypes.c_float
        read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
        memory = torch.zeros(threads * STREAMED // 4 + 16)
        start = (memory.data_ptr() + 63) // 64 * 64

        def rate(size: int, repeats: int) -> float:
            seconds = best(lambda: read(start, size // 4, repeats, threads))
            return threads * size * repeats / seconds

        cache, streamed = rate(native.second_level_cache() // 2, 100), rate(STREAMED, 1)
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    flops = 2 * 1024 * 2048 * 2048 / best(lambda: a @ b)
    return Rates(cache, streamed, flops)


def least_seconds(rates: Rates, m: int, n: int, tokens: int, k: int, itemsize: int = 4) -> float:
    """For k entries of an m x n weight."""
    products = max(4 * k * tokens / rates.cache_bytes, 2 * k * tokens / rates.flops)
    return products + (m + n) * tokens * itemsize / rates.memory_bytes


def best(run: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of some runs, in seconds."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)
