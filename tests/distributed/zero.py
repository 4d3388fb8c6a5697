# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed on two processes: ``torchrun -m tests.distributed.zero OUT CASE...``; see `worker`."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shira.store.names import is_sharded
from tests.distributed import task
from tests.distributed.worker import folder, main, mean, share, spare_deepspeed_a_compiler
from tests.tuner.models import llama

spare_deepspeed_a_compiler()

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def settings(stage: int, accumulate: int = 1, **zero: object) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": task.BATCH // dist.get_world_size() // accumulate,
        "gradient_accumulation_steps": accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
            **zero,
        },
    }


def engine_of(model: nn.Module, stage: int, accumulate: int = 1, **zero: object) -> nn.Module:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=task.RATE)
    config = settings(stage, accumulate, **zero)
    config["zero_force_ds_cpu_optimizer"] = False  # with offloading; the same SGD as elsewhere
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def gathered(model: nn.Module, trained: bool) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if ("shira_weight" in name) == trained:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[task.bare(name)] = parameter.detach().clone()
    return found


def train(engine: nn.Module, loss_of, pieces: int = 1) -> task.Result:
    before = gathered(engine, trained=False)
    losses, grads = [], []
    indices = range(task.BATCH)[share()]
    for step in range(task.STEPS):
        total = torch.zeros(())
        for piece in range(pieces):
            part = indices[piece * len(indices) // pieces : (piece + 1) * len(indices) // pieces]
            loss = loss_of(engine, slice(part.start, part.stop), step)
            engine.backward(loss)
            if piece == pieces - 1:
                full = deepspeed.utils.safe_get_full_grad
                named = engine.named_parameters()
                grads.append({task.bare(n): full(p) for n, p in named if p.requires_grad})
            engine.step()
            total += loss.detach() / pieces
        losses.append(mean(total))
    after = gathered(engine, trained=False)
    intact = all(torch.equal(before[name], after[name]) for name in before)
    return task.Result(losses, grads, gathered(engine, trained=True), intact)


@case
def zero2():
    engine = engine_of(task.adapted_llama(), 2)
    first = task.save(engine, folder())
    return {"result": train(engine, task.llama_loss), "file": first}


@case
def zero3():
    engine = engine_of(task.adapted_llama(), 3)
    first = task.save(engine, folder())
    result = train(engine, task.llama_loss)
    left = [name for name, value in engine.named_parameters() if not is_sharded(value)]
    return {"result": result, "file": first, "left": left}


@case
def zero2_offloads():
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    return train(engine_of(task.adapted_llama(), 2, **offload), task.llama_loss)


@case
def zero3_offloads():
    cpu = {"device": "cpu", "pin_memory": False}
    engine = engine_of(task.adapted_llama(), 3, offload_optimizer=cpu, offload_param=cpu)
    return train(engine, task.llama_loss)


@case
def zero3_accumulates():
    return train(engine_of(task.adapted_llama(), 3, accumulate=2), task.llama_loss, pieces=2)


@case
def zero3_checkpoints():
    model = task.adapted_llama()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return train(engine_of(model, 3), task.llama_loss)


@case
def zero3_tied():
    return train(engine_of(task.adapted_tied_llama(), 3), task.llama_loss)


@case
def zero3_all_layer_types():
    return train(engine_of(task.adapted_everything(), 3), task.everything_loss)


@case
def zero3_experts():
    engine = engine_of(task.adapted_mixture(), 3)
    first = task.save(engine, folder())
    result = train(engine, task.mixture_loss)
    left = [name for name, value in engine.named_parameters() if not is_sharded(value)]
    return {"result": result, "file": first, "left": left, "after": task.save(engine, folder())}


@case
def zero3_partitioned_before():
    """The base is in parts when the adapter is made, and the mask looks at the weights."""
    base = llama()
    deepspeed.zero.Init(module=base, config_dict_or_path=settings(3))
    assert all(is_sharded(weight) for weight in base.parameters())
    model = task.adapted_llama(base=base, mask_type="magnitude")
    assert all(is_sharded(w) for n, w in model.named_parameters() if "shira_weight" not in n)
    engine = engine_of(model, 3)
    first = task.save(engine, folder())
    fingerprint = model.peft_config["default"].base_fingerprint
    result = train(engine, task.llama_loss)
    return {"result": result, "file": first, "fingerprint": fingerprint}


@case
def zero3_different_positions():
    engine = engine_of(task.adapted_llama(seed=dist.get_rank()), 3)
    try:
        train(engine, task.llama_loss)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    main(CASES)
