# SPDX-License-Identifier: Apache-2.0
"""Whether adapters can be combined at all: weights of one shape, and of one base model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, judge_together
from shira.errors import AdapterError, WrongBaseError

BASE_FIELDS = ("base_model_name_or_path", "revision")


def check_together(
    adapters: Sequence[Adapter], names: Sequence[str], *, check_base: bool = True
) -> None:
    """Refuse adapters that do not belong together.

    A fingerprint says nothing of other positions than its own, so it is compared where two
    adapters have the same ones.

    Args:
        adapters: At least one.
        names: What each is called in errors.
        check_base: Whether their bases have to be the same, as far as they record them.

    Raises:
        AdapterError: If a parameter has different shapes, or lies on different devices.
        WrongBaseError: If they were trained on different base models.
    """
    for (a, a_name), (b, b_name) in itertools.combinations(zip(adapters, names, strict=True), 2):
        _check_shapes(a, a_name, b, b_name)
        if check_base:
            _check_names(a, a_name, b, b_name)
            _check_fingerprints(a, a_name, b, b_name)


def _check_shapes(a: Adapter, a_name: str, b: Adapter, b_name: str) -> None:
    for name in a:
        if name not in b:
            continue
        of_a, of_b = a[name].support, b[name].support
        if of_a.shape != of_b.shape:
            raise AdapterError(
                f"{name!r} has shape {of_a.shape} in {a_name} but {of_b.shape} in {b_name}: they "
                "are adapters of different models"
            )
        if of_a.indices.device != of_b.indices.device:
            raise AdapterError(
                f"{name!r} is on {of_a.indices.device} in {a_name} but on {of_b.indices.device} in "
                f"{b_name}; bring them together with adapter.to(device=...)"
            )


def _check_names(a: Adapter, a_name: str, b: Adapter, b_name: str) -> None:
    for field in BASE_FIELDS:
        of_a, of_b = a.metadata.get(field), b.metadata.get(field)
        if of_a and of_b and of_a != of_b:
            raise WrongBaseError(
                f"{a_name} was trained on {field}={of_a!r} but {b_name} on {of_b!r}; if that is "
                "one model under two names, pass check_base=False"
            )


def _check_fingerprints(a: Adapter, a_name: str, b: Adapter, b_name: str) -> None:
    for name in a:
        if name not in b or judge_together(a.metadata, b.metadata, name) != "another":
            continue
        if a[name].support == b[name].support:
            one, other = (x.metadata[FINGERPRINT_FIELD][name] for x in (a, b))
            raise WrongBaseError(
                f"{a_name} and {b_name} were trained on different base models: at the same "
                f"positions of {name!r} one recorded the base fingerprint {one}, the other "
                f"{other}; to combine them all the same, pass check_base=False"
            )
