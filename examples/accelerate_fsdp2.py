# SPDX-License-Identifier: Apache-2.0
"""Accelerate with FSDP2: two processes share one model, and write one adapter.

Adapter first, then ``accelerator.prepare``, which cuts the base's weights and the adapter's values
over the processes. Each process sees half of every batch. The adapter is gathered on all of them
and written once, and one process without FSDP can load it.

Run it:   python examples/accelerate_fsdp2.py [FOLDER]      starts the two processes itself, or
          torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py [FOLDER]
          (without a folder the files go to a temporary one)
Needs:    pip install 'shira[peft]'
Takes:    about 7 seconds on two CPU cores
"""

import os
import sys
import tempfile
from pathlib import Path

if "RANK" not in os.environ:  # started as one process: become torchrun with two
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM

from shira import PeftModel, ShiraConfig, get_peft_model

plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    reshard_after_forward=True,
    cpu_ram_efficient_loading=False,
    state_dict_type="FULL_STATE_DICT",
)
if torch.cuda.is_available():
    accelerator = Accelerator(fsdp_plugin=plugin)
else:  # Accelerate does not use its FSDP plugin on a CPU unless its state is set by hand
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP

folder = [sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()]
folder = Path(broadcast_object_list(folder)[0])  # the first process's, on both


def fresh_base():  # yours would be AutoModelForCausalLM.from_pretrained(...)
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**shape))


# The seed is given, so all processes train the same positions; shira checks that they do.
config = ShiraConfig(density=0.05, target_modules="all-linear", random_seed=0)
model = get_peft_model(fresh_base(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
rows = torch.stack([(torch.arange(16) + start) % 64 for start in range(64)])
batches = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
assert isinstance(model, FSDPModule)

values = next(p for p in model.parameters() if p.requires_grad)
mine = values.to_local().numel()
accelerator.print(
    f"{accelerator.num_processes} processes; of the {values.numel()} values of the first weight "
    f"the first process holds {mine}"
)
losses = []
for _epoch in range(8):
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
accelerator.print(f"FSDP2: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
assert losses[-1] < 0.5 * losses[0]

state_dict = accelerator.get_state_dict(model)  # gathers: every process takes part
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state_dict)
    alone = PeftModel.from_pretrained(fresh_base(), folder).eval()
    with torch.no_grad():
        again = alone(input_ids=rows, labels=rows).loss.item()
    print(f"saved: {folder}; loaded by one process, its loss on all rows is {again:.3f}")
    assert again < 0.5 * losses[0]
accelerator.wait_for_everyone()
accelerator.end_training()
