# SPDX-License-Identifier: Apache-2.0
"""The extension of vLLM's workers: adapters held in each worker, switched in place.

``LLM(..., worker_extension_cls="shira.serve.vllm.ShiraWorkerExtension")``, or ``vllm serve
--worker-extension-cls shira.serve.vllm.ShiraWorkerExtension``, gives every worker the methods
below, to be called on all of them with ``collective_rpc``. `shira.serve.client` does so in the
right order; called by hand, a switch leaves answers of the old weights in the prefix cache.

A method never raises: vLLM's executor stops reading at the first worker that fails and takes the
answers of the others for those of the next call. It returns a plain dict, ``{"ok": True, "method":
"shira_load", "rank": 0, ...}``, or ``{"ok": False, "method": "shira_load", "rank": 0, "error":
"WrongBaseError", "message": "..."}`` on all ranks, and then nothing has changed on any.

Importing this module on a CPU, which a worker does before it loads its model, has vLLM compute with
the weights themselves there: see `shira.serve.vllm_cpu`. Runs inside vLLM (made and tested for
0.32); sits above ``worker``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm.logger import init_logger

from shira.adapter import Adapter
from shira.checkpoints import Checkpoint, locate, open_checkpoint, without_tied
from shira.checkpoints.boxes import storage_key
from shira.checkpoints.conversion import Place
from shira.checkpoints.locating import check_untied
from shira.errors import MergeError, PlacementError, ServeError, ShiraError, shown
from shira.serve.loading import LoadedAdapter
from shira.serve.messages import Processes, Weights, agree, gather, located, wanted
from shira.serve.mixed import MixedBatches
from shira.serve.placement import Placement
from shira.serve.vllm_cpu import pack_again, packs_apart, writing
from shira.serve.worker import WorkerAdapters, by_places

__all__ = ["ShiraWorkerExtension"]

ADAPTERS: WeakKeyDictionary[nn.Module, WorkerAdapters] = WeakKeyDictionary()
"""The adapters of each model of this worker, for `shira.serve.vllm_transfer`."""
MIXED: WeakKeyDictionary[WorkerAdapters, MixedBatches] = WeakKeyDictionary()

_logger = init_logger(f"vllm.{__name__}")


class ShiraWorkerExtension:
    """The methods that a vLLM worker gains; each is called on all workers of an engine alike."""

    def shira_load(
        self,
        name: str,
        path: str,
        compare: bool = True,
        waiting: Collection[str] = (),
        riding: Collection[str] = (),
    ) -> dict[str, Any]:
        """Hold the adapter at a path under a name. Nothing that is served changes.

        Args:
            name: A name that is free.
            path: Of a file or folder that every worker can read.
            compare: False if the weights are no longer those of the checkpoint on disk.
            waiting: Adapters that requests wait for; see `shira_limit`.
            riding: Adapters that requests in flight bring along; see `shira_limit`.

        Returns:
            ``digest`` of the whole adapter, ``nnz``, ``nnz_here`` (on this rank), ``parameters``,
            ``checked`` (how many of them are known to be those of the adapter's base), ``nbytes``
            (memory on the rank that holds most of it); if batches are mixed, ``why_not`` as
            `shira_why_not` says it.
        """

        def load(adapters: WorkerAdapters) -> dict[str, Any]:
            return self._shira_load(adapters, name, path, compare)

        return self._shira_do("shira_load", load, kept=(waiting, riding))

    def shira_begin_load(self, name: str, path: str | None, compare: bool = True) -> dict[str, Any]:
        """Begin what `shira_load` does, in a thread beside the engine's steps.

        Then `shira_load_ready` until all workers say so, and `shira_end_load`. One load at a time.
        Without a path an adapter that was dropped is read again, before it is activated.
        """

        def begin(adapters: WorkerAdapters) -> None:
            if path is None:
                adapters.begin_load(name, None)
            else:
                source = located(path)
                read = self._shira_reader(source)
                adapters.begin_load(name, read, path=source, compare=compare)

        return self._shira_do("shira_begin_load", begin, settle=False)

    def shira_load_ready(self) -> dict[str, Any]:
        """Go on with the load that was begun, for milliseconds; ``ready``: it can be ended."""
        step = "shira_load_ready"
        return self._shira_do(step, lambda adapters: {"ready": adapters.load_ready()}, settle=False)

    def shira_end_load(
        self, waiting: Collection[str] = (), riding: Collection[str] = ()
    ) -> dict[str, Any]:
        """Hold what was loaded; arguments and what is returned are those of `shira_load`."""

        def end(adapters: WorkerAdapters) -> dict[str, Any]:
            with self._shira_unquantized():
                return _described(adapters, *adapters.end_load())

        return self._shira_do("shira_end_load", end, kept=(waiting, riding))

    def shira_activate(
        self: Any,
        weights: Weights,
        scale: float = 1.0,
        waiting: Collection[str] = (),
        riding: Collection[str] = (),
    ) -> dict[str, Any]:
        """Make adapters active in place of those that are.

        Args:
            weights: A name, ``{name: scale, ...}``, or None for the base.
            scale: With a single name, its factor.
            waiting: Adapters that requests wait for; see `shira_limit`.
            riding: Adapters that requests in flight bring along; see `shira_limit`.

        Returns:
            ``active`` as ``{name: scale}``, and so ``previous``; ``state``: a hash of what is
            active, ``"base"`` if nothing is.
        """

        def switch(adapters: WorkerAdapters) -> dict[str, Any]:
            self.synchronize_device()  # steps in flight still read the weights
            previous = adapters.active
            adapters.activate(weights, scale)
            return {"previous": previous}

        kept = waiting, riding
        return self._shira_do("shira_activate", switch, kept=kept)  # type: ignore[no-any-return]

    def shira_check(
        self,
        weights: Weights,
        scale: float = 1.0,
        waiting: Collection[str] = (),
        riding: Collection[str] = (),
    ) -> dict[str, Any]:
        """Fail as `shira_activate` would with the same arguments; nothing changes."""

        def check(adapters: WorkerAdapters) -> None:
            adapters.check(weights, scale)

        return self._shira_do("shira_check", check, kept=(waiting, riding))

    def shira_deactivate(self) -> dict[str, Any]:
        """Put the base back, bit for bit; returns as `shira_activate`."""
        return {**self.shira_activate(None), "method": "shira_deactivate"}

    def shira_unload(self, name: str) -> dict[str, Any]:
        """Forget an adapter that is not active."""

        def forget(adapters: WorkerAdapters) -> None:
            adapters.unload(name)
            if adapters in MIXED:
                MIXED[adapters].retire(name)

        return self._shira_do("shira_unload", forget)

    def shira_limit(
        self,
        max_adapter_memory: int | None,
        waiting: Collection[str] = (),
        riding: Collection[str] = (),
    ) -> dict[str, Any]:
        """Bound the bytes of each worker that adapters take; None: as many as there are.

        Beyond them the least recently used are dropped, of those that no request waits for first,
        and their files are read again at the next use; see `shira.serve.holding`. Every method that
        may drop adapters hears ``waiting``, and ``riding``: of requests in flight that bring their
        adapters along, which are never dropped.
        """

        def limit(adapters: WorkerAdapters) -> None:
            adapters.limit(max_adapter_memory)

        return self._shira_do("shira_limit", limit, kept=(waiting, riding))

    def shira_list(self) -> dict[str, Any]:
        """Return ``adapters`` as ``{name: what shira_load said}``, and ``discarded``."""

        def listed(adapters: WorkerAdapters) -> dict[str, Any]:
            held = adapters.holding
            names = [name for name in held.sources if name in held]  # in the order of loading
            known = {name: _facts(held.known(name)) for name in names}
            return {"adapters": known, "discarded": adapters.discarded}

        return self._shira_do("shira_list", listed)

    def shira_fingerprint(self) -> dict[str, Any]:
        """Hash all weights of this rank: ``base``, whatever is active, ``weights`` as is."""
        return self._shira_do("shira_fingerprint", lambda adapters: adapters.fingerprint())

    def shira_mix(self: Any) -> dict[str, Any]:
        """Let requests for different adapters run in one batch; see `shira.serve.mixed`.

        ``steps``: how many there were so far with a resident adapter, with riding ones, and how
        often the resident one changed.
        """

        def mix(adapters: WorkerAdapters) -> dict[str, Any]:
            if adapters not in MIXED:
                agree(adapters.processes, lambda: _check_can_mix(self))
                MIXED[adapters] = MixedBatches(self.model_runner, adapters)
            return {"steps": dict(MIXED[adapters].steps)}

        return self._shira_do("shira_mix", mix)  # type: ignore[no-any-return]

    def shira_why_not(
        self, weights: Weights, waiting: Collection[str] = (), riding: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return ``why_not``: why adapters cannot ride; empty if they can on all ranks."""

        def why(adapters: WorkerAdapters) -> dict[str, Any]:
            if adapters not in MIXED:
                raise ServeError("batches are not mixed in this engine: see shira_mix")
            adapters.check(weights)  # an entry that is not finite must not end a step
            found = gather(adapters.processes, MIXED[adapters].why_not(wanted(weights)))
            return {"why_not": next(filter(None, found), "")}

        return self._shira_do("shira_why_not", why, kept=(waiting, riding))

    def shira_sleep(self, level: int) -> dict[str, Any]:
        """Tell that the engine is going to sleep; at level 2 it drops the weights."""
        return self._shira_do("shira_sleep", lambda adapters: adapters.sleep(level))

    def shira_wake(self) -> dict[str, Any]:
        """Tell that the engine is awake, its weights in their memory again."""
        return self._shira_do("shira_wake", lambda adapters: adapters.wake())

    def shira_rebase(self: Any, check: bool = True) -> dict[str, Any]:
        """Apply what was active to weights that were loaded anew; see `WorkerAdapters.rebase`."""

        def rebase(adapters: WorkerAdapters) -> None:
            agree(adapters.processes, lambda: pack_again(self.get_model()))
            adapters.rebase(check=check)

        return self._shira_do("shira_rebase", rebase)  # type: ignore[no-any-return]

    def _shira_do(
        self: Any,
        method: str,
        step: Callable[[WorkerAdapters], Mapping[str, Any] | None],
        *,
        settle: bool = True,
        kept: tuple[Collection[str], Collection[str]] | None = None,
    ) -> dict[str, Any]:
        which = {"method": method, "rank": self.rank}
        held = None
        try:
            adapters = self._shira_adapters()
            held = adapters.holding
            with torch.no_grad():
                if settle and adapters in MIXED:
                    MIXED[adapters].settle()
                if kept is not None:
                    held.waiting, held.riding = kept
                said = step(adapters) or {}
            self.synchronize_device()
            now = {"active": adapters.active, "state": adapters.state}
            if adapters in MIXED and MIXED[adapters].resident:  # which nobody made active
                now = {"active": {}, "state": "base"}
            return {"ok": True, **which, **now, **held.report(), **said}
        except Exception as error:
            _logger.warning("%s: %s", type(error).__name__, shown(error))
            _logger.debug("%s", shown(traceback.format_exc(), lines=True))
            told = {"error": type(error).__name__, "message": str(error)}
            return {"ok": False, **which, **told, **(held.report() if held else {})}

    def _shira_adapters(self: Any) -> WorkerAdapters:
        model = self.get_model()
        if model not in ADAPTERS:
            self._shira_source = _source(self)
            compare = self.load_config.load_format != "dummy"

            places: dict[str, Place] = {}  # of the parameters of all adapters so far
            self._shira_places = places

            ADAPTERS[model] = WorkerAdapters(
                model,
                self.model_config.dtype,
                _EngineProcesses(self.rank),
                lambda name, placements: _refuse(model, name, placements),
                **by_places(places, compare=compare),
                beside=_EngineProcesses(self.rank, apart=True),
                writing=writing,
            )
        return ADAPTERS[model]

    def _shira_load(
        self: Any, adapters: WorkerAdapters, name: str, path: str, compare: bool
    ) -> dict[str, Any]:
        path = located(path)
        with self._shira_unquantized():
            read = self._shira_reader(path)
            return _described(adapters, name, adapters.load(name, read, path=path, compare=compare))

    def _shira_reader(self: Any, path: str) -> Callable[[], Adapter]:
        source: Checkpoint | None = self._shira_source

        def read() -> Adapter:
            try:
                adapter = Adapter.load(path, base=source)
                if source is not None:
                    adapter, heads = without_tied(adapter, source)
                    found, _ = locate(adapter, source)
                    untied = (found[name] for name in found if name not in heads)
                    check_untied(untied, source)
                    self._shira_places.update(found)
                return adapter
            except MergeError as error:  # tied or packed: no tensor of its own in the checkpoint
                raise PlacementError(str(error)) from None

        return read

    @contextmanager
    def _shira_unquantized(self: Any) -> Iterator[None]:
        try:
            yield
        except PlacementError as error:
            if self.model_config.quantization:
                raise PlacementError(
                    f"{error}. The model is served with quantization="
                    f"{self.model_config.quantization!r}; adapters need it unquantized"
                ) from error
            raise


class _EngineProcesses(Processes):
    """The workers of one engine: tensor and pipeline parallel, through their CPU groups."""

    def __init__(self, rank: int, *, apart: bool = False) -> None:
        """Make them; ``apart``: with connections of their own, for another thread."""
        groups = [parallel_state.get_tp_group(), parallel_state.get_pp_group()]
        self._groups = [
            _connected(group.ranks) if apart else group.cpu_group
            for group in groups
            if group.world_size > 1
        ]
        self.rank = 0  # among those that `gather` lists
        self.rank = self.gather(rank).index(rank)

    def gather(self, value: Any) -> list[Any]:
        """Return everyone's value, in one order for all."""
        values = [value]
        for group in self._groups:
            everyone: list[Any] = [None] * group.size()
            torch.distributed.all_gather_object(everyone, values, group=group)
            values = [each for some in everyone for each in some]
        return values


def _connected(ranks: list[int]) -> Any:
    new = torch.distributed.new_group
    return new(ranks, backend="gloo", use_local_synchronization=True)  # others do not take part


def _check_can_mix(worker: Any) -> None:
    """Refuse engines of which one batch cannot have several adapters; `ServeError` says why."""
    config = worker.vllm_config
    parallel, model = config.parallel_config, config.model_config
    missing = [
        name
        for name in ("_prepare_inputs", "_model_forward", "_get_prompt_logprobs_dict", "_dummy_run")
        if not hasattr(worker.model_runner, name)
    ]
    reasons = {
        "it compiles the model or captures graphs of it: start it with enforce_eager": (
            not model.enforce_eager or config.compilation_config.mode
        ),
        "it has pipeline stages": parallel.pipeline_parallel_size > 1,
        "it splits batches (dual batch overlap)": parallel.enable_dbo,
        "it guesses tokens ahead (speculative decoding)": config.speculative_config,
        "it serves LoRA adapters": config.lora_config,
        "it has an encoder": model.is_encoder_decoder,
        "it takes embeddings for prompts": model.enable_prompt_embeds,
        "it pools instead of generating": model.runner_type != "generate",
        f"its model runner has no {', '.join(missing)}": missing,
    }
    for reason, given in reasons.items():
        if given:
            raise ServeError(f"this engine cannot mix adapters in a batch: {reason}")


def _described(adapters: WorkerAdapters, name: str, loaded: LoadedAdapter) -> dict[str, Any]:
    """Return what `shira_load` says; of what is on disk already, too."""
    said = _facts(loaded)
    if adapters in MIXED:
        found = gather(adapters.processes, MIXED[adapters].why_not_this(name, loaded))
        said["why_not"] = next(filter(None, found), "")
    return said


def _facts(loaded: LoadedAdapter) -> dict[str, Any]:
    names = ("digest", "nnz", "nnz_here", "parameters", "checked", "nbytes")
    return {name: getattr(loaded, name) for name in names}


def _source(worker: Any) -> Checkpoint | None:
    """Open the checkpoint of the worker's model, if it is safetensors on this machine."""
    folder = worker.model_config.model
    try:
        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                folder,
                revision=worker.model_config.revision,
                cache_dir=worker.load_config.download_dir,
                local_files_only=True,
            )
        return open_checkpoint(folder)
    except (ShiraError, OSError, ValueError):  # not of the hub, not kept, or no safetensors
        return None


def _refuse(model: nn.Module, name: str, placements: tuple[Placement, ...]) -> None:
    """Refuse weights that vLLM computes with a copy of, made after loading, or moves or spreads."""
    keys = {placement.storage.key for placement in placements}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if packs_apart(module) and weight is not None and storage_key(weight) in keys:
            raise PlacementError(
                f"vLLM computes with a packed copy of {name!r} on this CPU: load "
                "shira.serve.vllm as the worker extension, before the model"
            )
        absorbed = getattr(module, "kv_b_proj", None)
        derives = any(hasattr(module, made) for made in ("W_UV", "W_UK_T", "W_K", "W_V"))
        if derives and absorbed is not None and keys & set(map(storage_key, absorbed.parameters())):
            raise PlacementError(
                f"vLLM computes with matrices derived from {name!r} (multi-head latent "
                "attention): single entries of it cannot be exchanged"
            )
        parallel: Any = getattr(getattr(module, "moe_config", None), "moe_parallel_config", None)
        if parallel is None or not keys & set(map(storage_key, module.parameters())):
            continue
        if parallel.enable_eplb:
            raise PlacementError(
                f"vLLM moves the experts of {name!r} from place to place while it serves "
                "(enable_eplb): start the engine without it"
            )
        if parallel.dp_size * parallel.pcp_size > 1:
            raise PlacementError(
                f"vLLM spreads the experts of {name!r} over more processes than those that this "
                f"engine switches together (data_parallel_size={parallel.dp_size}, "
                f"prefill_context_parallel_size={parallel.pcp_size}): spread them with "
                "tensor_parallel_size alone, with or without enable_expert_parallel"
            )
