# SPDX-License-Identifier: Apache-2.0
"""Whether the contenders of the ``gpu`` suite compute what they should.

A random model of 28 layers is chaotic: rounding in bfloat16 grows to a tenth of a gradient at its
bottom, whoever computes it. So gradients are compared where they can be, in `check_exactly`: the
first two layers, of the same widths, in float32 without TF32. Of the model that is timed,
`check_bits` compares what has to be the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_contenders
from benchmarks.gpu_contenders import Contender, Shape

TOLERANCE = 1e-3  # relative to the norm; float32, summed in other orders
NARROW_TOLERANCE = 2e-2  # of PEFT's untrained layers, whose products may be made otherwise
LAYERS = 2


def check_exactly(
    shape: Shape, targets: tuple[str, ...], r: int, tokens: int, device: str
) -> dict[str, Any]:
    """Compare logits, loss, input and value gradients in float32; the relative differences.

    ``shira`` with PEFT's SHiRA of the same positions and values, with each other backend, and
    ``shira-block`` with dense products in pieces.

    Raises:
        RuntimeError: If any two that should agree do not.
    """
    shape = replace(shape, layers=min(LAYERS, shape.layers))
    base = gpu_contenders.base_model(shape, tokens, device, torch.float32)
    inputs = gpu_contenders.batch(shape, 1, tokens, device, torch.float32)
    backends = gpu_contenders.other_backends(device, torch.float32, 0.02)
    makers = gpu_contenders.makers(base, targets, r, backends)
    field_of = {name: gpu_contenders.build(name, maker, base) for name, maker in makers.items()}
    with without_tf32():
        return compare(field_of, inputs)


def compare(field_of: dict[str, Contender], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Compare contenders around one base in float32, and leave their adapters filled.

    Raises:
        RuntimeError: If any two that should agree do not.
    """
    counts = {name: sum(p.numel() for p in c.trained) for name, c in field_of.items()}
    if len({count for name, count in counts.items() if name != "floor"}) != 1:
        raise RuntimeError(f"the adapters train different numbers of values: {counts}")
    floor = _logits(field_of["floor"], inputs)
    untrained = {
        name: _difference(_logits(contender, inputs), floor) for name, contender in field_of.items()
    }
    for contender in field_of.values():
        gpu_contenders.fill(contender)
    ours, blocks = field_of["shira"], field_of["shira-block"]
    pieces = replace(blocks, environment={"SHIRA_BACKEND": "chunked"})
    pairs = {
        f"shira against {name}": (ours, contender)
        for name, contender in field_of.items()
        if name == "peft-shira" or contender.environment
    } | {"shira-block against shira-block-chunked": (blocks, pieces)}
    differences = {pair: _differences(*both, inputs) for pair, both in pairs.items()}
    moved = _difference(_logits(ours, inputs), floor)
    found = {
        "tolerance": TOLERANCE,
        "untrained_logits": max(untrained.values()),
        "values_move_logits_by": moved,
        "differences": differences,
    }
    largest = max(max(kinds.values()) for kinds in differences.values())
    # a nan is in no order: not (a <= b)
    if not largest <= TOLERANCE or not found["untrained_logits"] <= TOLERANCE:
        raise RuntimeError(f"the contenders' answers differ by more than {TOLERANCE}: {found}")
    if not moved > 2 * TOLERANCE:
        raise RuntimeError(
            f"the values hardly move the logits: the comparison says little: {found}"
        )
    return found


def check_bits(field_of: dict[str, Contender], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Compare the contenders that are timed, bit for bit, and leave their adapters filled.

    Untrained, ours have the logits of the base (PEFT's to rounding); merged, those of unmerged.

    Raises:
        RuntimeError: If they do not.
    """
    floor = _logits(field_of["floor"], inputs)
    apart = 0.0
    for name, contender in field_of.items():
        logits = _logits(contender, inputs)
        if name.startswith("shira") and not torch.equal(logits, floor):
            raise RuntimeError(f"{name}: an untrained adapter changes the logits")
        apart = max(apart, _difference(logits, floor))
    if not apart <= NARROW_TOLERANCE:
        raise RuntimeError(f"an untrained adapter changes the logits by {apart:.3g}")
    for contender in field_of.values():
        gpu_contenders.fill(contender)
    for name in ("shira", "shira-block"):
        contender = field_of[name]
        unmerged = _logits(contender, inputs)
        contender.model.merge_adapter()
        merged = _logits(contender, inputs)
        contender.model.unmerge_adapter()
        if not torch.equal(unmerged, merged):
            raise RuntimeError(f"{name}: merged and unmerged logits differ")
        if torch.equal(unmerged, floor):
            raise RuntimeError(f"{name}: the values do not change the logits")
    return {"untrained_logits": apart, "merged_equals_unmerged": True}


@contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _differences(a: Contender, b: Contender, inputs: dict[str, Tensor]) -> dict[str, float]:
    (loss_a, input_a, values_a), (loss_b, input_b, values_b) = (
        _loss_and_gradients(contender, inputs) for contender in (a, b)
    )
    return {
        "logits": _difference(_logits(a, inputs), _logits(b, inputs)),
        "loss": _difference(loss_a, loss_b),
        "input_gradient": _difference(input_a, input_b),
        "value_gradients": max(map(_difference, values_a, values_b)),
    }


def _logits(contender: Contender, inputs: dict[str, Tensor]) -> Tensor:
    """Of the last positions, (batch, 8, vocab)."""
    with torch.no_grad(), contender.at_work():
        return contender.model(inputs_embeds=inputs["inputs_embeds"], logits_to_keep=8).logits


def _loss_and_gradients(
    contender: Contender, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    with contender.at_work():
        loss = contender.model(**inputs).loss
        x = inputs["inputs_embeds"]
        of_inputs, *of_values = torch.autograd.grad(loss, [x, *contender.trained])
    return loss.detach(), of_inputs, of_values


def _difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over the norm of ``b``."""
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm())
