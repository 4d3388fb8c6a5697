# SPDX-License-Identifier: Apache-2.0
"""What docs/distributed.md shows runs on two processes: its Python as one program, its commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shira
from shira import Adapter
from tests.forked import script
from tests.pages import DOCS, ROOT, blocks, commands

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PAGE = DOCS / "distributed.md"


def run(command: str, folder: Path) -> str:
    """What a command prints, in a folder; programs of this environment come first."""
    sources = os.pathsep.join([str(ROOT), str(Path(shira.__file__).parents[1])])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PYTHONPATH": sources, "PATH": programs, "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={**os.environ, **own, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr[-4000:]}"
    return done.stdout


def test_python_blocks(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(blocks(PAGE, "python")))
    script(tmp_path / "page.py", count=2, folder=tmp_path)
    found = Adapter.load(tmp_path / "adapter")
    assert len(found) > 7
    assert found.density == pytest.approx(0.02, rel=0.05)


def test_commands(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    lines = ["the cow eats grass", "the cat eats fish"] * 8
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    known = ["<unk>", "</s>", *sorted(set(" ".join(lines).split()))]
    vocabulary = {word: i for i, word in enumerate(known)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "MODEL")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"vocab_size": len(vocabulary), "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "MODEL")
    train, example = commands(PAGE)
    evaluated = f"{train} --max-steps 2 --batch-size 2 --eval-file train.txt"
    printed = run(evaluated, tmp_path)
    adapter = Adapter.load(tmp_path / "my-adapter")
    assert any(delta.values.count_nonzero() for delta in adapter.values())
    # One process writes: one adapter, one report.
    assert printed.count("after: loss") == 1
    assert json.loads((tmp_path / "my-adapter" / "metrics.json").read_text())["processes"] == 2
    card = (tmp_path / "my-adapter" / "README.md").read_text()
    assert "torchrun --nproc-per-node 2 -m shira train" in card
    # what `tests.examples.test_examples` runs
    assert f"{example} [FOLDER]" in (ROOT / "examples" / "accelerate_fsdp2.py").read_text()
