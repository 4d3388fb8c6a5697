# SPDX-License-Identifier: Apache-2.0
"""What docs/neighbours.md shows, each package in a process of its own; skipped where it is missing.

They pin versions of what the others need, so that they are not part of the environment. To run:
``pip install --no-deps --target FOLDER unsloth unsloth_zoo`` (and so on), with that in PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from shira import Adapter
from tests.pages import DOCS, blocks, what_a_reader_has

PAGE = DOCS / "neighbours.md"
PYTHON = blocks(PAGE, "python")
AXOLOTL, LLAMA_FACTORY = map(yaml.safe_load, blocks(PAGE, "yaml"))
STEPS = """
ids = torch.tensor([[3, 4, 6, 7], [3, 5, 6, 8]])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
losses = []
for _ in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]
model.save_pretrained("trained")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what_a_reader_has()
    return tmp_path


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(*command: str) -> None:
    paths = [str(Path.cwd()), *filter(None, sys.path)]
    settings = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DISABLE_VERSION_CHECK": "1"}
    env = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]


def trained(folder: str) -> Adapter:
    adapter = Adapter.load(folder)
    assert all(delta.values.any() for delta in adapter.values())
    return adapter


@needs("unsloth", "unsloth_zoo")
def test_unsloth(here):
    Path("run.py").write_text(PYTHON[0] + STEPS)
    run(sys.executable, "run.py")
    assert len(trained("trained")) == 4


@needs("axolotl", "bitsandbytes")
def test_axolotl(here):
    Path("shira_axolotl.py").write_text(PYTHON[1])
    others = {"base_model": "./llama", "datasets": [{"path": "rows.jsonl", "type": "completion"}]}
    others |= {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.01}
    others |= {"sequence_len": 64, "max_steps": 2, "bf16": False, "output_dir": "./out"}
    Path("config.yml").write_text(yaml.safe_dump(AXOLOTL | others))
    Path("rows.jsonl").write_text(json.dumps({"text": "the film was good"}))
    load = """
import torch
from axolotl.cli.config import load_cfg
from axolotl.loaders import ModelLoader, load_tokenizer
cfg = load_cfg("config.yml")
model, config = ModelLoader(cfg, load_tokenizer(cfg)).load()
"""
    Path("run.py").write_text(load + STEPS)
    run(sys.executable, "run.py")
    assert trained("trained").metadata["density"] == AXOLOTL["shira"]["density"]


@needs("llamafactory", "omegaconf", "torchaudio")
def test_llama_factory(here):
    exec(compile(PYTHON[2], str(PAGE), "exec"), {})
    others = {"stage": "sft", "do_train": True, "template": "empty", "dataset": "rows"}
    others |= {"dataset_dir": ".", "output_dir": "trained", "max_steps": 4, "use_cpu": True}
    others |= {"learning_rate": 0.01, "report_to": "none", "save_strategy": "no"}
    others |= {"disable_gradient_checkpointing": True}
    Path("train.yaml").write_text(yaml.safe_dump(LLAMA_FACTORY | others))
    row = {"instruction": "the film", "input": "", "output": "was good"}
    Path("rows.json").write_text(json.dumps([row] * 8))
    Path("dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    (lines,) = blocks(PAGE, "sh")
    run("sh", "-c", lines.replace("python ", f"{sys.executable} "))
    new, old = trained("trained"), Adapter.load("untrained")
    assert new.keys() == old.keys()
    assert all(new[name].support == old[name].support for name in new)


def test_the_plugin_is_a_program_of_its_own():
    """Without the packages: what the page shows of axolotl makes the adapter that it says."""
    from types import ModuleType, SimpleNamespace

    from shira.tuner import ShiraModel
    from tests.tuner.models import llama

    base = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = SimpleNamespace, object
    with pytest.MonkeyPatch.context() as patch:
        for name in ("axolotl", "axolotl.integrations"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, "axolotl.integrations.base", base)
        made: dict = {"__name__": "shira_axolotl"}
        exec(compile(PYTHON[1], str(PAGE), "exec"), made)
    plugin = made["ShiraPlugin"]()
    cfg = SimpleNamespace(**AXOLOTL, lora_model_dir=None)
    assert plugin.get_adapter_capabilities()[0].name == cfg.adapter
    model, config = plugin.load_adapter(llama(), cfg)
    assert isinstance(model.base_model, ShiraModel)
    assert config.density == 0.05
    assert any(p.requires_grad for p in model.parameters())
    assert plugin.load_adapter(llama(), cfg, config_only=True)[0] is None
    assert plugin.load_adapter(llama(), SimpleNamespace(adapter="lora")) is None
    assert torch.is_tensor(model(torch.ones(1, 2, dtype=torch.long)).logits)
