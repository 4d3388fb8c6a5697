# SPDX-License-Identifier: Apache-2.0
"""Compiles shira's C kernels when a wheel or an editable install is made.

Without a compiler the install succeeds all the same; shira then works through torch alone, slower,
and says so.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/shira/ops/native")


class NativeBuildHook(BuildHookInterface):
    """Adds the compiled library to the wheel, which then is one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what the wheel then holds; called by hatchling."""
        script = Path(self.root) / NATIVE / "build.py"
        spec = importlib.util.spec_from_file_location("shira_native_build", script)
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            library = build.build()
        except build.BuildError as error:
            self.app.display_warning(f"shira: no compiled kernels, torch does their work: {error}")
            return
        build_data["artifacts"].append(f"/{NATIVE / library.name}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
