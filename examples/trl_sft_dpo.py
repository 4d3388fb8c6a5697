# SPDX-License-Identifier: Apache-2.0
"""TRL: supervised fine-tuning of a SHiRA adapter, then DPO that goes on from it.

`SFTTrainer` gets a base model and a ``peft_config`` and makes the adapter. `DPOTrainer` gets the
model with that adapter: TRL then adds a frozen copy of it under the name "ref" and takes the
reference's log-probabilities from there. (Given a base model and a ``peft_config`` instead, the
reference is the base itself.) Neither holds a second model. The script checks that the reference
was the adapter of the first stage all the way, and that the base kept its bits.

Run it:   python examples/trl_sft_dpo.py [FOLDER]   (without one the files go to a temporary one)
Needs:    pip install 'shira[peft]' trl
Takes:    about 5 seconds on two CPU cores, most of them to import
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from shira import PeftModel, ShiraConfig

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# A tiny world: animals and what they eat. Supervised fine-tuning teaches that they eat.
eats = {"cow": "grass", "cat": "fish", "bird": "seeds", "dog": "meat", "bee": "nectar"}
wrong = dict(zip(eats, [*list(eats.values())[1:], "grass"], strict=True))
told = Dataset.from_list([{"text": f"the {who} eats {what}"} for who, what in eats.items()] * 4)
preferred = Dataset.from_list(
    [
        {"prompt": f"the {who}", "chosen": f" eats {eats[who]}", "rejected": f" eats {wrong[who]}"}
        for who in eats
    ]
)

# Stand-ins for AutoTokenizer.from_pretrained(...) and AutoModelForCausalLM.from_pretrained(...).
tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.train_from_iterator(
    told["text"], trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "</s>"])
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
)


torch.manual_seed(0)
shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
base = LlamaForCausalLM(LlamaConfig(**shape))
before = [(weight, weight.detach().clone()) for weight in base.parameters()]

common = {
    "per_device_train_batch_size": 5,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,  # TRL's default is True
    "disable_tqdm": True,
}


def train(trainer):
    trainer.remove_callback(PrinterCallback)  # which prints a line for each step
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


sft = SFTTrainer(
    model=base,
    args=SFTConfig(output_dir=str(folder / "sft-run"), max_steps=15, **common),
    train_dataset=told,
    processing_class=tokenizer,
    peft_config=ShiraConfig(
        density=0.1, target_modules="all-linear", random_seed=0, task_type="CAUSAL_LM"
    ),
)
log = train(sft)
sft.model.save_pretrained(folder / "sft")
print(f"SFT: loss {log[0]['loss']:.3f} at first, {log[-1]['loss']:.3f} at last")
assert log[-1]["loss"] < log[0]["loss"]

base = sft.model.unload()  # the base again, without the adapter: loading shows the saved one
model = PeftModel.from_pretrained(base, folder / "sft", is_trainable=True)
dpo = DPOTrainer(
    model=model,
    args=DPOConfig(output_dir=str(folder / "dpo-run"), max_steps=15, beta=0.1, **common),
    train_dataset=preferred,
    processing_class=tokenizer,
)
log = train(dpo)
model.save_pretrained(folder / "dpo", selected_adapters=["default"])  # not the reference
print(f"DPO: loss {log[0]['loss']:.3f} at first, {log[-1]['loss']:.3f} at last")
print(f"DPO: margin of the rewards {log[-1]['rewards/margins']:.2f}")
assert log[-1]["loss"] < log[0]["loss"]

# The reward is beta * (log-probability - reference's): its parts tell the reference of each step.
reference = [entry["logps/chosen"] - entry["rewards/chosen"] / dpo.beta for entry in log]
print(f"reference, mean log-probability of what was chosen: {reference[0]:.4f}", end=" ")
print(f"at first, {reference[-1]:.4f} at last")
assert max(reference) - min(reference) < 1e-3
assert log[0]["rewards/chosen"] == 0.0  # the policy began as the reference
assert all(torch.equal(weight, old) for weight, old in before)
print("base: the same bits")
