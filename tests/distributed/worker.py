# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does: ``torchrun -m tests.distributed.worker OUT CASE...``.

Rank 0 writes ``{case: [result of each rank]}`` to OUT; a case that raises has its error as result.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shira import Adapter, ShiraConfig, get_peft_model
from tests.distributed import task
from tests.tuner.experts import EXPERTS, mixture
from tests.tuner.models import llama
from tests.workers import leave

CASES: dict[str, Any] = {}


def case(function):
    CASES[function.__name__] = function
    return function


def share() -> slice:
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(rank * task.BATCH // size, (rank + 1) * task.BATCH // size)


def mean(loss: Tensor) -> float:
    total = loss.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def spare_deepspeed_a_compiler() -> None:
    """Its reductions for inference, which no training uses, take a core for 40 s to compile; and a
    run killed meanwhile leaves a lock in the home folder, for which every later one waits."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def folder() -> Path:
    return Path(tempfile.mkdtemp())


train = partial(task.train, mean=mean)


# ------------------------------------------------------------------------------------------ DDP


@case
def ddp():
    model = DistributedDataParallel(task.adapted_llama())
    sent = [name for name in model.named_module_buffers if "shira_indices" in name]
    first = task.save(model, folder())
    return {"result": train(model, task.llama_loss, share()), "sent": sent, "file": first}


@case
def ddp_accumulates():
    model = DistributedDataParallel(task.adapted_llama())

    def sync(last: bool) -> None:
        model.require_backward_grad_sync = last

    return train(model, task.llama_loss, share(), pieces=2, before_piece=sync)


@case
def ddp_all_layer_types():
    model = DistributedDataParallel(task.adapted_everything())
    return train(model, task.everything_loss, share())


@case
def ddp_compiled():
    torch._dynamo.reset()
    model = DistributedDataParallel(torch.compile(task.adapted_llama(), backend="aot_eager"))
    return train(model, task.llama_loss, share())


@case
def ddp_tied():
    return train(DistributedDataParallel(task.adapted_tied_llama()), task.llama_loss, share())


@case
def ddp_experts():
    model = DistributedDataParallel(task.adapted_mixture("grouped_mm"))
    return train(model, task.mixture_loss, share())


# ---------------------------------------------------------------------------------------- FSDP2


def sharded(model: nn.Module, checkpoint: bool = False, **options: Any) -> nn.Module:
    layers = model.base_model.model.model.layers
    if checkpoint:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i in range(len(layers)):
            layers[i] = checkpoint_wrapper(layers[i])
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


@case
def fsdp2():
    model = sharded(task.adapted_llama(), reshard_after_forward=True)
    first, theirs = task.save(model, folder()), folder()
    model.save_pretrained(theirs)
    written = (theirs / "adapter_model.safetensors").read_bytes()
    result = train(model, task.llama_loss, share())
    return {"result": result, "file": first, "written by PEFT": written}


@case
def fsdp2_trains_a_module_whole():
    model = sharded(task.adapted_llama(modules_to_save=["lm_head"]))
    theirs = folder()
    model.save_pretrained(theirs)
    adapter = Adapter.from_model(model)
    return {
        "written": (theirs / "adapter_model.safetensors").read_bytes(),
        "taken": adapter.tensors["lm_head.weight"],
    }


@case
def fsdp2_does_not_merge():
    model = sharded(task.adapted_llama())
    try:
        model.merge_adapter()
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


@case
def fsdp2_does_not_merge_experts():
    model = sharded(task.adapted_mixture())
    try:
        model.base_model.model.model.layers[0].mlp.experts.merge()
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


@case
def fsdp2_tied():
    model = sharded(task.adapted_tied_llama(), reshard_after_forward=True)
    return train(model, task.llama_loss, share())


@case
def fsdp2_keeps_whole():
    model = sharded(task.adapted_llama(), reshard_after_forward=False)
    return train(model, task.llama_loss, share())


@case
def fsdp2_checkpoints():
    model = sharded(task.adapted_llama(), checkpoint=True, reshard_after_forward=True)
    return train(model, task.llama_loss, share())


@case
def fsdp2_accumulates():
    model = sharded(task.adapted_llama(), reshard_after_forward=True)
    sync = model.set_requires_gradient_sync
    return train(model, task.llama_loss, share(), pieces=2, before_piece=sync)


@case
def fsdp2_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train(sharded(task.adapted_llama(), mp_policy=policy), task.llama_loss, share())


@case
def fsdp2_bfloat16_base():
    return train(sharded(task.adapted_llama(dtype=torch.bfloat16)), task.llama_loss, share())


@case
def fsdp2_each_layer_alone():
    """Shards the base layers themselves, whose own forward is never called."""
    model = task.adapted_everything()
    inner = model.base_model.model
    for layer in (inner.emb, inner.conv, inner.conv1d, inner.lin):
        fully_shard(layer.base_layer)
    fully_shard(model)
    return train(model, task.everything_loss, share())


@case
def fsdp2_experts():
    model = sharded(task.adapted_mixture(), reshard_after_forward=True)
    first = task.save(model, folder())
    result = train(model, task.mixture_loss, share())
    return {"result": result, "file": first, "after": task.save(model, folder())}


@case
def fsdp2_experts_alone():
    """Shards the wrappers around the experts, and the layers, each by itself."""
    model = task.adapted_mixture("grouped_mm")
    for layer in model.base_model.model.model.layers:
        fully_shard(layer.mlp.experts)
        fully_shard(layer.self_attn.q_proj)
    return train(sharded(model), task.mixture_loss, share())


@case
def fsdp2_compiled():
    torch._dynamo.reset()
    model = task.adapted_llama()
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return train(sharded(model), task.llama_loss, share())


# -------------------------------------------------------------------------- different positions


def mismatch(wrap, model: nn.Module, loss_of=task.llama_loss) -> str:
    try:
        task.train(wrap(model), loss_of, share())
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@case
def only_one_rank_has_a_second_model():
    """What a rank does besides, with a model of its own, is its own matter."""
    keep = task.adapted_llama(seed=5) if dist.get_rank() == 0 else None
    result = train(DistributedDataParallel(task.adapted_llama()), task.llama_loss, share())
    del keep
    return result


@case
def different_positions():
    def model() -> nn.Module:
        return task.adapted_llama(seed=dist.get_rank())

    def compiled(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        return DistributedDataParallel(torch.compile(model, backend="aot_eager"))

    return {
        "ddp": mismatch(DistributedDataParallel, model()),
        "ddp without buffers": mismatch(
            partial(DistributedDataParallel, broadcast_buffers=False), model()
        ),
        "fsdp2": mismatch(sharded, model()),
        "compiled": mismatch(compiled, model()),
        "copied": mismatch(DistributedDataParallel, copy.deepcopy(model())),
    }


@case
def fsdp2_adapted_after():
    """The values of the adapter are not FSDP2's."""
    found = {}
    for name in ("linear", "experts", "compiled"):
        base = mixture() if name == "experts" else llama()
        for part in base.model.layers if name == "linear" else ():
            fully_shard(part)
        fully_shard(base)
        config = ShiraConfig(density=0.13, random_seed=0)
        config.target_modules = None if name == "experts" else task.PROJECTIONS
        config.target_parameters = EXPERTS if name == "experts" else None
        model = get_peft_model(base, config)
        if name == "compiled":
            torch._dynamo.reset()
            base.model.layers[0].compile(backend="aot_eager")
        loss = task.mixture_loss if name == "experts" else task.llama_loss
        found[name] = mismatch(lambda model: model, model, loss)

    return found


def main(cases: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    out, names = sys.argv[1], sys.argv[2:]
    dist.init_process_group("gloo")
    results = {}
    for name in names or cases:
        try:
            result = cases[name]()
        except Exception:
            result = traceback.format_exc()
            print(f"{name}: {result}", file=sys.stderr, flush=True)  # the ranks may part ways now
        results[name] = [None] * dist.get_world_size()
        dist.all_gather_object(results[name], result)
    if dist.get_rank() == 0:
        torch.save(results, out)
    leave()


if __name__ == "__main__":
    main(CASES)
