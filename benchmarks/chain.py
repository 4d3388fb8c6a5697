# SPDX-License-Identifier: Apache-2.0
"""Suite ``chain``: what changed from one checkpoint to the next, as links of a chain.

A bf16 checkpoint takes steps as of Adam: all entries move by about the learning rate, in float32
masters that are kept beside it, and few of them are other bfloat16 numbers afterwards. Its weights
are random, or those of ``--model``. For each rate the sizes, in bytes a changed entry, of

- ``link``: what ``shira.chain.diff`` writes, all of the file;
- ``positions and values``: int32 and bf16, as sparse patches have them;
- ``xor, deflated``: old xor new of all entries, compressed by zlib at level 1;

and the seconds that ``diff`` and ``apply`` take, and a plain copy.

Then a chain of ``--links`` links is applied in place, ten at a time, in processes that are killed
at random ``--kills`` times in all. Checked: the checkpoint is the old one or the new one, byte for
byte, after each; and the one that the link was made from after each tenth link.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import environment, report

NAME = "chain"
SEED = 42
WIDTH = 1024


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    megabytes: int = field(default=128, metadata={"help": "size of a random checkpoint"})
    model: str = field(default="", metadata={"help": "a bf16 safetensors file instead"})
    rates: str = field(default="3e-7,1e-6,3e-6,1e-5", metadata={"help": "learning rates"})
    rate: float = field(default=1e-6, metadata={"help": "that of the steps of the chain"})
    links: int = field(default=20, metadata={"help": "links of the chain"})
    kills: int = field(default=10, metadata={"help": "processes that are killed"})
    folder: str = field(default="", metadata={"help": "where to work; default: a temporary one"})


def unavailable() -> str:
    """Why it cannot be measured here; empty if it can."""
    return "" if hasattr(os, "fork") else "processes are forked and killed"


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Make the checkpoints, time, kill, check; the whole JSON document of the suite."""
    surroundings = environment.describe()
    neighbours = environment.Neighbours()
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(dir=settings.folder or None, prefix="shira-chain-") as where:
        root = Path(where)
        masters = _masters(settings)
        sizes = {}
        for rate in settings.rates.split(","):
            progress(f"chain: a step of {rate}")
            sizes[rate] = _step(root, masters, float(rate))
        progress("chain: the links")
        held = _hold(root, masters, settings, progress)
    surroundings["cpu_share_of_others"] = neighbours.share()
    body = {"answers": {"equal_bit_for_bit": True}, "results": {"steps": sizes, "chain": held}}
    return report.document(NAME, asdict(settings), surroundings, body)


def _masters(settings: Settings) -> dict[str, torch.Tensor]:
    """Weights in float32, each within the rounding of the bf16 one that the checkpoint has."""
    if settings.model:
        weights = {k: w.float() for k, w in load_file(settings.model).items() if w.dim() > 1}
    else:
        count = max(settings.megabytes * 10**6 // (2 * WIDTH * WIDTH), 1)
        weights = {f"layers.{i}.weight": 0.03 * torch.randn(WIDTH, WIDTH) for i in range(count)}
    for weight in weights.values():
        rounded = weight.bfloat16()
        above = torch.nextafter(rounded.abs(), torch.full_like(rounded, 1e9))
        weight += (torch.rand_like(weight) - 0.5) * (above - rounded.abs()).float()
    return weights


def _stepped(masters: dict[str, torch.Tensor], rate: float) -> dict[str, torch.Tensor]:
    return {k: w - rate * torch.randn_like(w).clamp_(-3, 3) for k, w in masters.items()}


def _save(masters: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({k: w.bfloat16() for k, w in masters.items()}, path)
    return path


def _step(root: Path, masters: dict[str, torch.Tensor], rate: float) -> dict[str, Any]:
    """One step: its link, and the other ways to tell it."""
    from shira import chain

    old = _save(masters, root / "old.safetensors")
    new = _save(_stepped(masters, rate), root / "new.safetensors")
    link, made = root / "link", root / "made.safetensors"
    started = time.perf_counter()
    told = chain.diff(old, new, link, overwrite=True)
    diffed = time.perf_counter()
    chain.apply(old, link, made, overwrite=True)
    applied = time.perf_counter()
    shutil.copyfile(old, root / "copy")
    copied = time.perf_counter()
    _require(_digest(made) == _digest(new), "a link does not make the new checkpoint")
    xor = 0
    before, after = load_file(old), load_file(new)
    for name, weight in before.items():
        bits = weight.view(torch.int16) ^ after[name].view(torch.int16)
        xor += len(zlib.compress(bits.numpy().tobytes(), 1))
    each = {"link": told.size, "positions and values": 6 * told.changed, "xor, deflated": xor}
    return {
        "changed_share": told.changed / told.numel,
        "bytes": old.stat().st_size,
        "bytes_a_changed_entry": {name: size / told.changed for name, size in each.items()},
        "seconds": {
            "diff": diffed - started,
            "apply": applied - diffed,
            "copy": copied - applied,
        },
    }


def _hold(
    root: Path,
    masters: dict[str, torch.Tensor],
    settings: Settings,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """A chain, applied in place ten links at a time by processes that are killed.

    The masters are used up.
    """
    from shira import chain

    here = _save(masters, root / "here.safetensors")
    links, digests = [], [_digest(here)]
    old = shutil.copyfile(here, root / "0.safetensors")
    for number in range(1, settings.links + 1):
        for weight in masters.values():
            weight -= settings.rate * torch.randn_like(weight).clamp_(-3, 3)
        new = _save(masters, root / f"{number}.safetensors")
        links.append(root / f"{number}.link")
        chain.diff(old, new, links[-1])
        digests.append(_digest(new))
        old.unlink()
        old = new
    masters.clear()  # what is forked below is small
    rng, found, longest = random.Random(SEED), {"old": 0, "new": 0}, 0.0
    rounds = range(0, settings.links, 10)
    for turn, first in enumerate(rounds):
        last = min(first + 10, settings.links)
        kept = shutil.copyfile(here, root / "kept.safetensors")
        kills = settings.kills // len(rounds) + (turn < settings.kills % len(rounds))
        for kill in range(kills + 1):
            progress(f"chain: {first} to {last}, {kill} of {kills} killed")
            started = time.perf_counter()
            child = _applying(here, links)
            if kill:  # the first one ends, and tells how long that takes
                time.sleep(rng.random() * longest)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if not kill:
                _require(status == 0, "a chain cannot be applied")
                longest = time.perf_counter() - started
            now = _digest(here)
            _require(now in (digests[first], digests[last]), "neither the old nor the new one")
            _require(kill > 0 or now == digests[last], f"link {last} made another checkpoint")
            if kill:
                found["new" if now == digests[last] else "old"] += 1
            if kill < kills:
                shutil.copyfile(kept, here)
        chain.apply(here, links[:last], in_place=True)  # where the last one killed left it
        _require(_digest(here) == digests[last], f"link {last} made another checkpoint")
    sizes = [link.stat().st_size for link in links]
    return {
        "links": len(links),
        "bytes": here.stat().st_size,
        "bytes_of_links": sum(sizes),
        "equal_at_each_tenth": True,
        "killed": sum(found.values()),
        "found": found,
        "seconds_of_the_last_ten": longest,
    }


def _applying(here: Path, links: list[Path]) -> int:
    """A process that applies to a checkpoint the next ten links, of the first that are given."""
    from shira import chain

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            at = chain.verify(links, here).applied or 0
            chain.apply(here, links[at : at + 10], in_place=True)
            os._exit(0)
        os._exit(1)
    return child


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
    return digest.hexdigest()


def _require(held: bool, else_: str) -> None:
    if not held:
        raise RuntimeError(else_)


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    steps, held = result["results"]["steps"], result["results"]["chain"]
    ways = list(next(iter(steps.values()))["bytes_a_changed_entry"])
    table = report.Table(
        "A step of a bf16 checkpoint: bytes a changed entry, and seconds",
        ["rate", "changed", *ways, "diff", "apply", "copy"],
        notes=report.busy_note(result),
    )
    for rate, row in steps.items():
        each, seconds = row["bytes_a_changed_entry"], row["seconds"]
        sizes = [f"{each[way]:.2f}" for way in ways]
        times = [f"{seconds[what]:.2f}" for what in ("diff", "apply", "copy")]
        table.rows.append([rate, f"{row['changed_share']:.2%}", *sizes, *times])
    table.notes.insert(
        0,
        f"A chain of {held['links']} links over {held['bytes'] / 1e6:.0f} MB, "
        f"{held['bytes_of_links'] / 1e6:.1f} MB in all: equal at each tenth link; {held['killed']} "
        f"processes killed, {held['found']['old']} left the old one, {held['found']['new']} the "
        "new one.",
    )
    return [table]
