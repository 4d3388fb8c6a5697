# SPDX-License-Identifier: Apache-2.0
"""Compiles the C files beside this one: ``python -m shira.ops.native.build``.

Installing shira runs this (``hatch_build.py``); where there is no compiler, shira works without and
says so (`shira.ops.choose`). The library links neither torch nor Python, so one build serves every
version of both. It imports nothing of shira, so that it can run before shira is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "_native.so"

_FLAGS = ["-O3", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"]
# Suffix of the functions' names, and what to compile for: a CPU takes the best it can.
_X86 = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "base": [],
}
_OTHER: dict[str, list[str]] = {"base": []}


class BuildError(Exception):
    """There is no compiler, or it could not compile the files."""


def build(target: Path = LIBRARY, variants: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Compile the library to a file, which is written whole or not at all.

    ``variants`` are the compiler's flags by instruction set, the suffix of the functions' names; by
    default all that this kind of machine may have.

    Raises:
        BuildError: If there is no compiler or it fails; says what it printed.
    """
    compiler = _compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants = variants or (_X86 if x86 else _OTHER)
    openmp = ["-fopenmp"] if _has_openmp(compiler) else ["-Wno-unknown-pragmas"]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in ("deltas", "entries", "tiles", "gaps", "patch", "points"):
            for isa, flags in variants.items():
                made = Path(folder) / f"{source}-{isa}.o"
                what = [f"-DISA={isa}", *flags, "-c", str(HERE / f"{source}.c")]
                _run([compiler, *_FLAGS, *openmp, *what, "-o", str(made)])
                objects.append(str(made))
        whole = Path(folder) / "whole.so"
        rest = ["-shared", str(HERE / "cpu.c"), *objects, "-o", str(whole)]
        _run([compiler, *_FLAGS, *openmp, *rest])
        beside = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(whole, beside)
        beside.replace(target)
    return target


def _compiler() -> str:
    if sys.platform == "win32":
        raise BuildError("the compiled kernels are not built on Windows")
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("there is no C compiler (cc, gcc or clang; CC names another)")


def _has_openmp(compiler: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.c"
        probe.write_text("#include <omp.h>\nint probe(void) { return omp_get_max_threads(); }\n")
        made = ["-shared", "-fPIC", "-fopenmp", str(probe), "-o", str(Path(folder) / "probe.so")]
        return subprocess.run([compiler, *made], capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"error: {error}")
