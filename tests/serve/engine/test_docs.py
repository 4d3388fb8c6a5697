# SPDX-License-Identifier: Apache-2.0
"""The Python of docs/serving.md that needs vLLM, as one program; ../test_docs.py runs the rest.

The page's model is a small one here, and training is left out. Its first engine is given up for a
second one, as the page says; the one of the RL loop is that second one.
"""

from __future__ import annotations

import shutil

import pytest
import torch
import vllm

from shira.adapter import Adapter
from shira.delta import SparseDelta
from tests.pages import DOCS, blocks
from tests.serve.engine.guide import lay_out
from tests.serve.engine.zoo import ENGINE, PROMPTS, TOKENS, answers, merged, save_merged

pytestmark = pytest.mark.vllm
PAGE = DOCS / "serving.md"
SMALL = ENGINE | {"skip_tokenizer_init": False, "weight_transfer_config": {"backend": "shira"}}


def test_python_blocks_for_vllm(zoo, forked, tmp_path, monkeypatch, capsys):
    lay_out(zoo, tmp_path)
    shutil.copytree(zoo.path("a"), tmp_path / "adapters" / "policy")
    monkeypatch.chdir(tmp_path)
    code = [block for block in blocks(PAGE, "python") if "Client" in block or "client." in block]
    assert len(code) == 4
    generator = torch.Generator().manual_seed(7)
    trained = Adapter(
        {
            name: SparseDelta(delta.support, 0.5 * torch.randn(delta.nnz, generator=generator))
            for name, delta in zoo.adapters["a"].items()
        }
    )
    monkeypatch.setattr(Adapter, "from_model", lambda model: model)
    real, engines = vllm.LLM, []

    def small(model, **options):
        if "weight_transfer_config" in options:
            return engines[-1]
        for engine in engines:
            engine.llm_engine.engine_core.shutdown()
        engines.append(real(model, **SMALL, **options))
        return engines[-1]

    monkeypatch.setattr(vllm, "LLM", small)
    namespace = {"model": trained}
    try:
        exec(compile("\n".join(code), str(PAGE), "exec"), namespace)
        assert len(engines) == 2
        printed = capsys.readouterr().out
        assert printed.count("outputs=[CompletionOutput(") >= 1 + 3
        assert "{'french': 1.0}" in printed
        client = namespace["client"]
        assert set(client.list()["adapters"]) == {"french", "policy"}
        assert client.active == {"policy": 1.0}
        greedy = vllm.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        out = engines[1].generate(prompts, greedy, use_tqdm=False)
    finally:
        engines[-1].llm_engine.engine_core.shutdown()
    weights = merged(zoo.weights, (trained, 1.0))
    expected = answers(save_merged(tmp_path / "merged", zoo.base, weights))
    assert [list(each.outputs[0].token_ids) for each in out] == [tokens for tokens, _ in expected]
