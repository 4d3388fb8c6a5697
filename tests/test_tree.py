# SPDX-License-Identifier: Apache-2.0
"""The tree: nothing imports upwards, names load on use, and importing costs no more than torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shira

ROOT = Path(shira.__file__).parent

# What each part may import of shira at module level: itself and the parts below it.
BELOW = {
    "_version": set(),
    "errors": set(),
    "support": {"errors"},
    "blocks": {"errors", "support"},
    "gaps": {"errors", "support"},
    "operators": {"errors", "support"},
    "base": {"errors"},
    "delta": {"errors", "support", "operators", "base"},
    "masks": {"errors", "support", "blocks", "base", "delta", "ops"},
    "ops": {"errors", "support", "blocks", "gaps", "base", "delta"},
    # A compact file names its writer, and may hold the seed of a random mask instead of indices.
    "store": {"_version", "errors", "support", "blocks", "gaps", "base", "delta", "masks"},
    "checkpoints": {"errors", "support", "base", "delta", "store"},
    "fusing": {"_version", "errors", "support", "base", "delta", "masks"},
    "measure": {"errors", "support", "base", "delta", "fusing"},
    "convert": {"errors", "support", "base", "delta", "masks", "store", "checkpoints"},
    "switch": {"errors", "support", "blocks", "base", "delta", "ops", "store"},
    "tuner": {
        *("errors", "support", "blocks", "base", "delta", "masks", "ops"),
        *("store", "checkpoints", "fusing"),
    },
    "serve": {
        *("errors", "support", "base", "delta", "ops", "store", "checkpoints"),
        *("convert", "switch"),
    },
    "cli": {
        *("_version", "errors", "support", "base", "delta", "masks", "ops", "store"),
        *("checkpoints", "fusing", "measure", "convert", "switch", "tuner", "serve"),
    },
    "__main__": {"cli"},
    "__init__": {"_version"},
}
CORE = [
    *("errors", "support", "blocks", "gaps", "operators", "base", "delta"),
    *("masks", "ops", "store", "checkpoints", "fusing", "measure", "convert", "switch"),
]
CORE_PACKAGES = {"torch", "numpy", "safetensors", "shira"}
# Files of the core that import an optional package, and are themselves imported on use only.
ON_USE = {"ops/triton_kernel.py": {"triton"}}


def parts():
    return sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files()})


def files():
    return [path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts]


def imports(path: Path):
    """Modules imported when the file is: not inside functions, not for type checkers only."""
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "shira" else [node.module]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            )


def _module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


_ON_USE_MODULES = {f"shira.{_module_of(ROOT / name)}" for name in ON_USE}


def test_every_part_is_known():
    assert set(parts()) == set(BELOW)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upwards(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "shira" and rest:
            where = shira._WHERE.get(rest, f"shira.{rest}")  # "from shira import Adapter"
            below = where.split(".")[1]
            assert below == part or below in BELOW[part], f"{path.name} imports {name}"
        if part in CORE:
            more = ON_USE.get(path.relative_to(ROOT).as_posix(), set())
            known = CORE_PACKAGES | more | set(sys.stdlib_module_names)
            assert top in known, f"the core imports {name}"
        assert name not in _ON_USE_MODULES, f"{name} is for use, not for import"


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print(' '.join(sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


@pytest.mark.parametrize(
    "code",
    [
        "import shira",
        "import shira; shira.Support, shira.SparseDelta, shira.Adapter, shira.ShiraError",
        "from shira import convert, masks, ops, store",
        "import shira.switch",
        "import shira; shira.Switch",
        "from shira import fuse, overlap",
    ],
)
def test_the_core_loads_neither_peft_nor_transformers(code):
    loaded = modules_after(code)
    assert not loaded & {"peft", "transformers", "accelerate", "typer", "rich"}


def test_import_shira_alone_loads_not_even_torch():
    assert "torch" not in modules_after("import shira")


def test_a_name_of_the_tuner_loads_peft():
    assert "peft" in modules_after("import shira; shira.ShiraConfig")


def test_public_names():
    assert shira.__all__ == [
        "Adapter",
        "PeftModel",
        "ShiraConfig",
        "ShiraError",
        "ShiraLayer",
        "ShiraModel",
        "SparseDelta",
        "Support",
        "Switch",
        "__version__",
        "calibrate",
        "convert",
        "fuse",
        "get_peft_model",
        "masks",
        "ops",
        "overlap",
        "store",
    ]
    assert all(hasattr(shira, name) for name in shira.__all__)
    assert dir(shira) == shira.__all__


def test_an_unknown_name_suggests():
    with pytest.raises(AttributeError, match="Did you mean 'ShiraConfig'"):
        shira.ShiraConfg  # noqa: B018


def test_training_without_peft_says_what_to_install(tmp_path):
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError('no peft', name='peft')")
    code = "import shira\ntry:\n    shira.ShiraConfig\nexcept ImportError as e:\n    print(e)"
    out = subprocess.check_output(
        [sys.executable, "-c", code],
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT.parent}", "PATH": ""},
    )
    assert "pip install 'shira[peft]'" in out


def test_source_files_carry_a_licence_and_a_docstring():
    for path in files():
        text = path.read_text()
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0"), path
        assert ast.get_docstring(ast.parse(text)), path
