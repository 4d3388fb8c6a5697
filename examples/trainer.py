# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with a SHiRA adapter: train, save, reload, compare.

A small random Llama learns to count. Only 5 % of the entries of its linear layers are trained;
the loss falls, the base keeps its bits, and the adapter that was saved computes the same bits when
it is loaded on a fresh base.

Run it:   python examples/trainer.py [FOLDER]   (without a folder the files go to a temporary one)
Needs:    pip install 'shira[peft]'
Takes:    about 5 seconds on two CPU cores, most of them to import transformers and PEFT
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from shira import PeftModel, ShiraConfig, get_peft_model  # instead of: from peft import ...

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())


def fresh_base():  # yours would be AutoModelForCausalLM.from_pretrained(...)
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**shape))


# Rows of 16 numbers that count upwards from anywhere, modulo 64.
rows = [(torch.arange(16) + start) % 64 for start in range(64)]
dataset = [{"input_ids": row, "labels": row} for row in rows]

base = fresh_base()
before = [(weight, weight.detach().clone()) for weight in base.parameters()]

config = ShiraConfig(
    density=0.05,  # or r=8: as many entries as LoRA of rank 8 has parameters
    target_modules="all-linear",
    random_seed=0,
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=16,
        max_steps=40,
        learning_rate=2e-2,  # sparse adapters want a larger rate than LoRA
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=dataset,
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"Trainer: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
assert losses[-1] < 0.5 * losses[0]

# Training put the adapter into each weight for the length of a product. Nothing is left of it.
assert all(torch.equal(weight, old) for weight, old in before)
print(f"base: the same bits in all {len(before)} tensors")

model.save_pretrained(folder / "adapter")  # what Trainer.save_model writes too
size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
print(f"saved: {folder / 'adapter'}, {size:,} bytes")

reloaded = PeftModel.from_pretrained(fresh_base(), folder / "adapter").eval()
tokens = torch.stack(rows[:8])
with torch.no_grad():
    assert torch.equal(reloaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    guess = reloaded(input_ids=torch.tensor([[40, 41, 42, 43]])).logits[0, -1].argmax().item()
print("reloaded: the same logits, bit for bit")
print(f"after 40, 41, 42, 43 it says {guess}")
