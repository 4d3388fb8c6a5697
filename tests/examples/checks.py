# SPDX-License-Identifier: Apache-2.0
"""Checks inside the process of an example: ``python -m tests.examples.checks NAME SCRIPT``.

Nothing of torch or shira is imported before the script runs, so that what it imports can be seen.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


def imports_the_core_alone(script: dict[str, Any]) -> None:
    others = {"peft", "transformers", "accelerate", "diffusers", "typer", "rich", "vllm"}
    assert not others & set(sys.modules), others & set(sys.modules)
    assert "shira.switch" in sys.modules


def references_are_right(script: dict[str, Any]) -> None:
    """TRL's log-probabilities of the reference are those of the frozen model, computed by hand."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from shira import Adapter, PeftModel, ShiraConfig

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**script["shape"]))

    def by_hand(model, batch):
        """The log-probability of each completion of a batch, chosen ones first."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1]
        each = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (each * batch["completion_mask"][:, 1:]).sum(1)

    # The reference of the script: the adapter of the first stage, frozen.
    dpo, folder = script["dpo"], script["folder"]
    frozen = PeftModel.from_pretrained(base(), folder / "sft")
    batch = next(iter(dpo.get_train_dataloader()))
    found = torch.cat(dpo.compute_ref_log_probs(dpo.model, batch))
    want = by_hand(frozen, batch)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    others = {"base": base(), "policy": PeftModel.from_pretrained(base(), folder / "dpo")}
    for name, other in others.items():
        assert (by_hand(other, batch) - want).abs().max() > 0.1, f"{name} is no other model"
    # What each training step used, from its rewards: the batch is the whole data set.
    chosen = want[: len(want) // 2].mean().item()
    assert len(script["reference"]) == 15
    assert all(abs(value - chosen) < 1e-4 for value in script["reference"])
    values = [p for name, p in dpo.model.named_parameters() if name.endswith(".ref")]
    assert len(values) == 14
    assert not any(value.requires_grad for value in values)
    dpo.model.set_adapter("ref")
    ids = batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(dpo.model.eval()(input_ids=ids).logits, frozen(input_ids=ids).logits)
    assert Adapter.load(folder / "sft") != Adapter.load(folder / "dpo")

    # With a base and a peft_config: the base.
    second = DPOTrainer(
        model=base(),
        args=DPOConfig(output_dir=str(folder / "second"), max_steps=3, **script["common"]),
        train_dataset=script["preferred"],
        processing_class=script["tokenizer"],
        peft_config=ShiraConfig(density=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    second.train()
    found = torch.cat(second.compute_ref_log_probs(second.model, batch))
    torch.testing.assert_close(found, by_hand(base(), batch), rtol=1e-5, atol=1e-5)
    assert (by_hand(second.model, batch) - found).abs().max() > 1e-3, "nothing was learnt"


if __name__ == "__main__":
    check = globals()[sys.argv[1]]
    del sys.argv[:2]
    check(runpy.run_path(sys.argv[0], run_name="__main__"))
