# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer: ``torchrun -m tests.distributed.trainer OUT CASE...``; see `worker`.

Accelerate does not use its FSDP plugin on a CPU, so `Fsdp2Trainer` sets it by hand.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.distributed import task
from tests.distributed.worker import main, spare_deepspeed_a_compiler

STEPS, SAVED = 4, 2
CASES: dict[str, Any] = {}


def case(function):
    CASES[function.__name__] = function
    return function


def use_fsdp2(state: AcceleratorState, cpu_ram_efficient_loading: bool) -> None:
    """What Accelerate does with an FSDP plugin, had it an accelerator."""
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=cpu_ram_efficient_loading,
        state_dict_type="FULL_STATE_DICT",
    )
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class InOrderTrainer(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Fsdp2Trainer(InOrderTrainer):
    cpu_ram_efficient_loading = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        use_fsdp2(self.accelerator.state, self.cpu_ram_efficient_loading)
        self.is_fsdp_enabled = True


class EfficientFsdp2Trainer(Fsdp2Trainer):
    cpu_ram_efficient_loading = True


def fit(trainer_class: type[Trainer], **options: Any) -> dict[str, Any]:
    """Trains in one go, and again with a break in the middle; and writes without having learnt."""
    home = shared_folder()
    whole = run(trainer_class, home / "whole", STEPS, **options)
    run(trainer_class, home / "broken", SAVED, **options)
    resumed = run(trainer_class, home / "broken", STEPS, resume=f"checkpoint-{SAVED}", **options)
    run(trainer_class, home / "unmoved", 1, learning_rate=0.0, **options)
    read = {
        name: (home / name / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()
        for name, step in (("whole", STEPS), ("broken", STEPS), ("unmoved", 1))
    }
    config = (home / "unmoved" / "checkpoint-1" / "adapter_config.json").read_text()
    return {"whole": whole, "resumed": resumed, "files": read, "config": config}


def run(
    trainer_class: type[Trainer], home: Path, steps: int, resume: str | None = None, **options: Any
) -> list[float]:
    """The losses of a training; its checkpoints are in ``home``."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = TrainingArguments(
        **{
            "output_dir": str(home),
            "per_device_train_batch_size": task.BATCH // size,
            "max_steps": steps,
            "learning_rate": task.RATE,
            "lr_scheduler_type": "constant",
            # so large an epsilon makes it momentum: smooth, and yet with a state to resume
            "optim": "adamw_torch",
            "adam_epsilon": 1.0,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_steps": SAVED if steps > 1 else 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **options,
        }
    )
    ids = torch.randint(64, (task.BATCH * STEPS, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = trainer_class(model=task.adapted_llama(), args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(home / resume) if resume else None)
    check_wrapping(trainer, trainer_class)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_wrapping(trainer: Trainer, trainer_class: type[Trainer]) -> None:
    """The run was what it is said to have been."""
    kind = type(trainer.model_wrapped).__name__
    if issubclass(trainer_class, Fsdp2Trainer):
        assert isinstance(trainer.model_wrapped, torch.distributed.fsdp.FSDPModule), kind
    elif trainer.is_deepspeed_enabled:
        assert kind == "DeepSpeedEngine", kind
    elif dist.is_initialized():
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel), kind


def accelerated(fsdp: bool) -> dict[str, Any]:
    """The training of `task`, written with Accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if fsdp:
        use_fsdp2(accelerator.state, cpu_ram_efficient_loading=False)
    model = task.adapted_llama()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=task.RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(
        model, torch.distributed.fsdp.FSDPModule if fsdp else nn.parallel.DistributedDataParallel
    )
    losses = []
    each = task.BATCH // accelerator.num_processes // 2
    for step in range(task.STEPS):
        total = torch.zeros(())
        for piece in range(2):
            first = (accelerator.process_index * 2 + piece) * each
            with accelerator.accumulate(model):
                loss = task.llama_loss(model, slice(first, first + each), step)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / 2
        losses.append(accelerator.reduce(total, "mean").item())
    home = shared_folder()
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(home, state_dict=state_dict)
    accelerator.wait_for_everyone()
    file = (home / "adapter_model.safetensors").read_bytes()
    return {"losses": losses, "values": task.values_of(model), "file": file}


@case
def accelerate_ddp():
    return accelerated(fsdp=False)


@case
def accelerate_fsdp2():
    return accelerated(fsdp=True)


def shared_folder() -> Path:
    made = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return Path(made[0])


def deepspeed_settings(stage: int) -> dict[str, Any]:
    spare_deepspeed_a_compiler()
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


@case
def ddp():
    return fit(InOrderTrainer)


@case
def fsdp2():
    return fit(Fsdp2Trainer)


@case
def fsdp2_loads_on_one_rank():
    return fit(EfficientFsdp2Trainer)


@case
def zero2():
    return fit(InOrderTrainer, deepspeed=deepspeed_settings(2))


@case
def zero3():
    return fit(InOrderTrainer, deepspeed=deepspeed_settings(3))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(CASES)
