# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ run, and what they say and write is so. (serving.py: `test_serving`.)"""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from shira import Adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def losses(printed: str, line: str) -> tuple[float, float]:
    """First and last loss of a line that begins so."""
    found = re.search(rf"^{line}: loss ([\d.]+) .*?, ([\d.]+) ", printed, re.MULTILINE)
    assert found, printed
    return float(found[1]), float(found[2])


def trained(folder: Path) -> Adapter:
    """The adapter of a folder, no value of which is missing or has stayed zero throughout."""
    adapter = Adapter.load(folder)
    for name, delta in adapter.items():
        assert delta.values.isfinite().all(), name
        assert delta.values.count_nonzero() > 0.5 * delta.support.nnz, name
    return adapter


@pytest.mark.slow
@needs("peft")
def test_trainer(run_forked, tmp_path):
    printed = run_forked("trainer.py")
    first, last = losses(printed, "Trainer")
    assert last < 0.5 * first
    assert "it says 44" in printed
    adapter = trained(tmp_path / "out" / "adapter")
    assert adapter.density == pytest.approx(0.05, rel=0.01)
    assert len(adapter) == 14


@pytest.mark.slow
@needs("trl")
def test_trl(run_forked, tmp_path):
    printed = run_forked("trl_sft_dpo.py", check="references_are_right")
    for stage in ("SFT", "DPO"):
        first, last = losses(printed, stage)
        assert last < first
        assert len(trained(tmp_path / "out" / stage.lower())) == 14
    assert not (tmp_path / "out" / "dpo" / "ref").exists()


@pytest.mark.slow
@needs("diffusers")
def test_diffusers(run_forked, tmp_path):
    printed = run_forked("diffusers_unet.py")
    styles = {}
    for style in ("down", "across"):
        first, last = losses(printed, style)
        assert last < first
        styles[style] = trained(tmp_path / "out" / style)
        assert {len(delta.support.shape) for delta in styles[style].values()} == {2, 4}
    down, across = styles.values()
    assert down.keys() == across.keys()
    assert all(down[name].support != across[name].support for name in down)


@pytest.mark.slow
@needs("peft")
def test_fsdp2(run_forked, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from shira import ShiraConfig, get_peft_model

    printed = run_forked("accelerate_fsdp2.py", count=2)
    assert "2 processes" in printed
    assert printed.count("saved: ") == 1
    first, last = losses(printed, "FSDP2")
    assert last < 0.5 * first
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    found = trained(tmp_path / "out")
    # Whole, and at the places that one process trains.
    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **shape))
    config = ShiraConfig(density=0.05, target_modules="all-linear", random_seed=0)
    alone = Adapter.from_model(get_peft_model(base, config))
    assert {name: delta.support for name, delta in found.items()} == {
        name: delta.support for name, delta in alone.items()
    }


def test_fsdp2_becomes_torchrun(monkeypatch):
    """Started as one process. What torchrun then does: `tests/distributed/test_docs.py`."""
    started = []

    def become(program, command):
        started.append((program, command))
        raise SystemExit

    path = str(EXAMPLES / "accelerate_fsdp2.py")
    monkeypatch.setattr("os.execv", become)
    monkeypatch.setattr("sys.argv", [path, "folder"])
    with pytest.raises(SystemExit):
        runpy.run_path(path, run_name="__main__")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    assert started == [(sys.executable, [sys.executable, *torchrun.split(), path, "folder"])]


def test_edge_switching(run, tmp_path):
    printed = run("edge_switching.py", check="imports_the_core_alone")
    assert printed.count("bit for bit") == 5
    base = torch.nn.Linear(256, 512).weight
    for name in ("night", "rain", "snow"):
        file = tmp_path / "out" / f"{name}.safetensors"
        adapter = trained(file)
        assert adapter["0.weight"].support.shape == base.shape
        assert file.stat().st_size < 2.2 * adapter.nnz  # bfloat16 values, and the seed


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_say_what_they_are(script):
    text = (EXAMPLES / script).read_text()
    said = ast.get_docstring(ast.parse(text))
    assert f"python examples/{script}" in said
    assert "Needs: " in said
    assert "Takes: " in said
    # one starts a server of its own, and looks into it
    assert len(text.splitlines()) <= (260 if script == "grpo.py" else 120)


def test_tables_and_page_have_every_script():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for text in (page, (EXAMPLES / "README.md").read_text()):
        listed = re.findall(r"^\| \[`(\w+\.py)`\]", text, re.MULTILINE)
        assert sorted(listed) == SCRIPTS
    assert sorted(re.findall(r'--8<-- "examples/(\w+\.py)"', page)) == SCRIPTS
