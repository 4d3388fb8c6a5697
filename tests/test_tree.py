# SPDX-License-Identifier: Apache-2.0
"""The tree: nothing imports upwards, names load on use, and importing costs no more than torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shira

ROOT = Path(shira.__file__).parent

# What each part may import of shira, wherever in the file: itself and the parts below it.
BELOW = {
    "_version": set(),
    "errors": set(),
    "support": {"errors"},
    "blocks": {"errors", "support"},
    "base": {"errors"},
    "delta": {"errors", "support", "base"},
    "adapter": {"errors", "support", "delta"},
    "masks": {"errors", "support", "blocks", "base", "delta", "ops"},
    "ops": {"errors", "support", "blocks", "base", "delta"},
    # A compact file names its writer, holds indices as the gaps that the compiled kernels code, or
    # the seed of a random mask instead.
    "store": {
        *("_version", "errors", "support", "blocks", "base", "delta", "adapter", "masks", "ops"),
    },
    "checkpoints": {"errors", "support", "base", "delta", "adapter", "store"},
    "fusing": {"_version", "errors", "support", "base", "delta", "adapter", "masks"},
    "measure": {"errors", "support", "base", "delta", "adapter", "fusing"},
    "convert": {"errors", "support", "base", "delta", "adapter", "masks", "store", "checkpoints"},
    "chain": {"_version", "errors", "ops", "store", "checkpoints", "convert"},
    "switch": {"errors", "support", "blocks", "base", "delta", "adapter", "ops", "store"},
    "tuner": {
        *("errors", "support", "blocks", "base", "delta", "adapter", "masks", "ops"),
        *("store", "checkpoints", "fusing"),
    },
    "serve": {
        *("errors", "support", "base", "delta", "adapter", "ops", "store", "checkpoints"),
        *("convert", "switch"),
    },
    "cli": {
        *("_version", "errors", "support", "base", "delta", "adapter", "masks", "ops", "store"),
        *("checkpoints", "fusing", "measure", "convert", "chain", "switch", "tuner", "serve"),
    },
    "__main__": {"cli"},
    # Names that load on first use are typed there; `__getattr__` imports them by their names.
    "__init__": {
        *("_version", "errors", "support", "delta", "adapter", "masks", "ops", "store"),
        *("fusing", "measure", "convert", "chain", "switch", "tuner"),
    },
}
# The few imports that go upwards, inside functions and for annotations: (file, part) and why.
DOORS = {
    ("adapter", "store"): "Adapter.load, .save and .from_model",
    ("adapter", "checkpoints"): "Adapter.load(base=...), which reads the shapes of a checkpoint",
    ("adapter", "fusing"): "a + b, 2 * a, .restrict, .prune and .to",
    ("adapter", "measure"): "Adapter.compare",
}
CORE = [
    *("errors", "support", "blocks", "base", "delta", "adapter"),
    *("masks", "ops", "store", "checkpoints", "fusing", "measure", "convert", "switch"),
]
CORE_PACKAGES = {"torch", "numpy", "safetensors", "shira"}
# Files of the core that import an optional package, and are themselves imported on use only.
ON_USE = {name: {"triton"} for name in ("ops.gradient.triton_kernel", "ops.mixed_batch_triton")}


def files():
    return sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    """The file as a module, without ``shira.``: ``ops.linear``, ``ops.__init__``."""
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


MODULES = {name_of(path): path for path in files()}


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(name: str, *, at_once: bool = False):
    """Modules that a file imports; with ``at_once`` those that importing the file imports."""
    pending = list(TREES[name].body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            for alias in node.names:
                yield _module(f"{node.module}.{alias.name}") or node.module
        elif at_once and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif not (at_once and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            pending.extend(ast.iter_child_nodes(node))


def _module(name: str) -> str | None:
    """The module of shira that a name is, or, for ``shira.Adapter``, comes from."""
    rest = name.removeprefix("shira.")
    if rest == name:
        return None
    if rest in MODULES or f"{rest}.__init__" in MODULES:
        return name
    return shira._WHERE.get(rest)


def own_imports(name: str):
    """Names of the files of shira that a file imports, but for those through a door."""
    for imported in imports(name):
        if imported.startswith("shira."):
            rest = imported.removeprefix("shira.")
            if (name, rest.split(".")[0]) not in DOORS:
                yield rest if rest in MODULES else f"{rest}.__init__"


def test_every_part_is_known():
    assert {name.split(".")[0] for name in MODULES} == set(BELOW)


def test_nothing_imports_upwards():
    for name in MODULES:
        part = name.split(".")[0]
        for imported in own_imports(name):
            below = imported.split(".")[0]
            assert below == part or below in BELOW[part], f"{name} imports {imported}"


def test_importing_the_core_needs_torch_numpy_and_safetensors_only():
    for name in MODULES:
        core = name.split(".")[0] in CORE
        known = CORE_PACKAGES | ON_USE.get(name, set()) | set(sys.stdlib_module_names)
        for imported in imports(name, at_once=True):
            assert not core or imported.split(".")[0] in known, f"{name} imports {imported}"
            assert imported.removeprefix("shira.") not in ON_USE, f"{name} imports {imported}"


def test_no_file_imports_itself_in_a_circle():
    """Imports in function bodies and for annotations included."""
    needs = {name: set(own_imports(name)) - {name} for name in MODULES}
    before = None
    while before != len(needs):  # what nobody needs, or what needs nothing, is in no circle
        before = len(needs)
        needed = set().union(*needs.values())
        needs = {name: more for name, more in needs.items() if name in needed and more}
        needs = {name: more & needs.keys() for name, more in needs.items()}
    assert not needs, sorted(needs)


def test_the_doors_are_few_and_used():
    assert len(DOORS) <= 5
    for name, part in DOORS:
        assert any(i.split(".")[1:2] == [part] for i in imports(name)), (name, part)
        assert part not in BELOW[name.split(".")[0]]


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print(' '.join(sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


@pytest.mark.parametrize(
    "code",
    [
        "import shira",
        "import shira; shira.Support, shira.SparseDelta, shira.Adapter, shira.ShiraError",
        "from shira import chain, convert, masks, ops, store",
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
        "FactoredAdamW",
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
        "chain",
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


def test_docstrings_say_what_is_done():
    """None opens with a question word, of attributes neither; none speaks of what is meant."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                text = str(node.value.value) or "-"
                first = text.split()[0].strip("`*:,.")
                assert first not in {"What", "Whether", "Where", "Which", "How"}, f"{name}: {text}"
                assert "meant" not in text, f"{name}: {text}"


# Tests of what goes through several modules, by the part whose promise they hold; the others are
# called as the module or the package that they test.
TOPICS = {
    "": "docs doctests readme site tree",
    "chain": "docs",
    "cli": "hostile_text inputs_are_kept main snapshots train_docs",
    "convert": "docs gguf mapped_models merging_models whole",
    "fusing": "docs",
    "measure": "extremes overlap rank",
    "ops": "packed",
    "serve": "docs restoring vllm_loading",
    "serve/http": "bounded",
    "store": "stock_peft",
    "switch": "docs failures imports properties whole",
    "tuner": (
        "attention calibrate check_ranks compile computed_weight describe diffusers exactness "
        "interrupts lifecycle memory moving offload optimizers own_forward parity peft_suite "
        "register steps switch training transforms usage weighted whole"
    ),
}


def test_tests_mirror_the_tree():
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        part, name = path.parent.relative_to(tests).as_posix().replace(".", ""), path.stem[5:]
        place = ROOT / part / name
        if not (ROOT / part).is_dir() or place.is_dir() or place.with_suffix(".py").exists():
            continue  # of what is not in src, or of a module
        topics = [path.parent.name, *TOPICS.get(part, "").split()]
        assert name in topics, f"{path}: no module of this name; a topic goes into TOPICS"
    for part in {name.split(".")[0] for name in MODULES} - {"__init__", "__main__", "_version"}:
        assert (tests / part).is_dir() or (tests / f"test_{part}.py").exists(), f"no tests: {part}"


def test_the_makefile_names_tests_that_exist():
    top = Path(__file__).parents[1]
    kinds = ("fast", "lowest", "wheel", "quantized", "triton", "vllm-servers")
    told = subprocess.check_output(
        ["make", "--dry-run", *(f"test-{kind}" for kind in kinds)],
        cwd=top,
        env={**os.environ, "MAKEFLAGS": ""},
        text=True,
    )
    named = {word for word in told.split() if word.startswith("tests/")}
    assert "tests/masks" in named
    assert not [name for name in named if not (top / name).exists()]
