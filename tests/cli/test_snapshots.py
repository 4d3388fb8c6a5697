# SPDX-License-Identifier: Apache-2.0
"""The command line as others call it: commands, options, defaults, help, and what --json prints.

Options, defaults and JSON are what scripts rely on, and stay; words of the help may improve. After
such a change, write the snapshots anew and read their diff:

    RENEW_SNAPSHOTS=1 python -m pytest tests/cli/test_snapshots.py
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import typer.main
from safetensors.torch import save_file

from shira import Adapter, SparseDelta, Support, __version__
from shira.base import fingerprint
from shira.cli.app import COMMANDS, _global_options, build_app
from shira.ops import native

FOLDER = Path(__file__).parent / "snapshots"


def check(name: str, key: str, found: object) -> None:
    """Compare one entry of a snapshot, or write it."""
    file = FOLDER / f"{name}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if os.environ.get("RENEW_SNAPSHOTS"):
        kept[key] = found
        file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    assert found == kept.get(key), f"{key}: see the head of {Path(__file__).name}"


# ------------------------------------------------------------------------------------------- help


def described(parameter, annotation) -> dict[str, object]:
    """An option or argument: from its annotation, and from typer what typer makes of the rest."""
    kind, info = get_args(annotation)
    default = parameter.default
    if isinstance(default, Path):
        default = str(default)
    elif not isinstance(default, (bool, int, float, str)):
        default = None  # releases of click have signs of their own for none
    facts = {
        "names": sorted([*parameter.opts, *parameter.secondary_opts]),
        "kind": parameter.param_type_name,
        "type": getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind),
        "least": info.min,
        "metavar": info.metavar,
        "default": default,
        "required": parameter.required,
        "environment": info.envvar,
        "group": info.rich_help_panel,
        "help": info.help,
    }
    return {name: fact for name, fact in facts.items() if fact not in (None, False)}


def all_described(command, function) -> list[dict[str, object]]:
    hints = get_type_hints(function, include_extras=True)
    return [described(p, hints[p.name]) for p in command.params if p.name in hints]


def test_the_application():
    app = typer.main.get_command(build_app(COMMANDS))
    parameters = all_described(app, _global_options)
    check(
        "help",
        "shira",
        {"help": app.help, "commands": list(app.commands), "parameters": parameters},
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name):
    command = typer.main.get_command(build_app(COMMANDS)).commands[name]
    parameters = all_described(command, importlib.import_module(COMMANDS[name]).command)
    check("help", name, {"help": command.help.splitlines(), "parameters": parameters})


# ------------------------------------------------------------------------------------------- JSON

SHAPES = {"layers.0.up.weight": (12, 8), "layers.1.up.weight": (12, 8), "norm.weight": (6,)}
LINES = {
    "inspect, compact": "inspect a.safetensors",
    "inspect, PEFT": "inspect b",
    "inspect, with the base": "inspect b --base base",
    "inspect, whole tensors": "inspect tensors --base base",
    "overlap": "overlap a.safetensors b --rank",
    "overlap, fast": "overlap a.safetensors b tensors --fast",
    "fuse": "fuse a.safetensors=0.5 b -o fused --no-check-base",
    "fuse, ties": "fuse a.safetensors b --method ties --density 0.5 -o fused --format peft",
    "merge": "merge b --base base -o merged --undo undo",
    "merge, whole": "merge tensors --base base -o merged --no-check-base",
    "unmerge": "unmerge made --undo made.undo -o again",
    "extract": "extract base made -o found.safetensors",
    "extract, budget": "extract base tuned -o found --format peft --density 0.25 --exclude norm*",
    "convert": "convert b -o b.safetensors --dtype bfloat16",
    "convert, PEFT": "convert tensors -o found --to peft",
    "convert, patch": "convert b --format patch --base base -o patch.safetensors --scale 2",
    "convert, LoRA": "convert lora -o found.safetensors --base base",
    "switch-bench": "switch-bench a.safetensors b --repeats 2",
    "switch-bench, alone": "switch-bench --shape 16x8 --rank 1 --repeats 1 --no-compare",
}


def numbers(size: int, step: int) -> torch.Tensor:
    """Numbers that every float dtype holds exactly."""
    return ((torch.arange(size) * step) % 101 - 50) / 64


@pytest.fixture
def place(shira, tmp_path, monkeypatch):
    """Adapters in both formats, a base in two files, one merged, one tuned, and a LoRA."""
    monkeypatch.chdir(tmp_path)
    base = {
        name: numbers(torch.Size(shape).numel(), 37).view(shape) for name, shape in SHAPES.items()
    }
    files = {"1": [*SHAPES][:1], "2": [*SHAPES][1:]}
    for folder, change in (("base", 0.0), ("tuned", 1.0)):
        Path(folder).mkdir()
        index = {}
        for file, names in files.items():
            more = {n: change * numbers(base[n].numel(), 11).view_as(base[n]) for n in names}
            save_file({n: base[n] + more[n] for n in names}, f"{folder}/{file}.safetensors")
            index |= dict.fromkeys(names, f"{file}.safetensors")
        Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    made = {}
    for at, name in enumerate(("a", "b", "tensors")):
        deltas, prints = {}, {}
        for weight in [*SHAPES][: 3 - at]:
            support = Support(SHAPES[weight], torch.arange(at, base[weight].numel(), 3 + at))
            values = numbers(support.indices.numel(), 13 + at)
            values[0] = 1e-9  # changes nothing
            deltas[weight] = SparseDelta(support, values)
            prints[weight] = fingerprint(base[weight].view(-1)[support.indices.long()])
        metadata = {"mask_type": "random", "random_seed": at, "base_fingerprint": prints}
        whole = {"norm.weight": numbers(6, 3)} if name == "tensors" else {}
        made[name] = Adapter(deltas, metadata, whole)
    made["a"].save("a.safetensors")
    made["b"].save("b", format="peft")
    made["tensors"].save("tensors")
    Path("lora").mkdir()
    key = "base_model.model.layers.0.up"
    factors = {"A": numbers(16, 7).view(2, 8), "B": numbers(24, 5).view(12, 2)}
    save_file(
        {f"{key}.lora_{name}.weight": factor for name, factor in factors.items()},
        "lora/adapter_model.safetensors",
    )
    Path("lora/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    assert shira("merge", "b", "--base", "base", "-o", "made", "--undo", "made.undo").status == 0


def steady(value: object, key: str = "") -> object:
    """What any machine says: figures to five digits, and of times and sizes only the type."""
    if isinstance(value, dict):
        return {name: steady(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [steady(part, key) for part in value]
    if key in ("load_seconds", "best", "median", "samples", "kernels", "threads") or (
        key in ("bytes", "file_bytes", "size") and value != 24  # of a file; 24: of a tensor
    ):
        return type(value).__name__
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return value.replace(__version__, "VERSION").replace(str(Path.cwd()), "HERE")
    return value


@pytest.mark.parametrize("name", LINES)
@pytest.mark.usefixtures("place")
def test_what_json_says(shira, name):
    if name.startswith("switch-bench") and native.load().library is None:
        pytest.skip("no compiled kernels, and so no limit")
    answer = shira(*LINES[name].split(), "--json")
    assert answer.status == 0, answer.err
    check("output", name, steady(json.loads(answer.out, parse_constant=pytest.fail)))
