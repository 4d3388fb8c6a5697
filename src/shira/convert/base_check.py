# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is the base that an adapter was made for, as far as fingerprints tell.

An adapter records a hash of the base values at its entries, in the dtype that the base had. A
checkpoint of that dtype or a wider one can be held against it, for rounding to it is exact; one of
a narrower dtype may come from the same base, but cannot show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from shira.delta import SparseDelta, fingerprint
from shira.errors import WrongBaseError

Verdict = Literal["verified", "not recorded", "not comparable", "another base"]
"""What a fingerprint says; "another base" only where the caller asked to go on all the same."""


def check_values(
    metadata: Mapping[str, Any],
    name: str,
    delta: SparseDelta,
    held: Tensor,
    where: str,
    refuse: bool,
) -> Verdict:
    """Hold the base values of one tensor against the adapter's fingerprint.

    Args:
        metadata: The adapter's; ``base_fingerprint`` maps parameter names to fingerprints.
        name: The parameter.
        delta: Its delta; one of zeros changes nothing and so fits every base.
        held: ``(k,)`` the base's values at the entries.
        where: Which tensor they are of, for the message.
        refuse: Whether another base is an error.

    Raises:
        WrongBaseError: If it is another base, and ``refuse``.
    """
    recorded = (metadata.get("base_fingerprint") or {}).get(name)
    if recorded is None or not bool(delta.values.any()):
        return "not recorded"
    dtype = getattr(torch, recorded.partition(":")[0], None)
    if not isinstance(dtype, torch.dtype):
        return "not comparable"
    found = fingerprint(held.to(dtype))
    if found == recorded:
        return "verified"
    if dtype != held.dtype and torch.promote_types(dtype, held.dtype) != held.dtype:
        return "not comparable"
    if refuse:
        base = metadata.get("base_model_name_or_path")
        raise WrongBaseError(
            f"{where}: wrong base: it does not hold the values that the adapter was trained on "
            f"(fingerprint {found}, recorded {recorded})"
            f"{f'; its base is {base!r}' if base else ''}. To go on all the same, say so: "
            "check_base=False, --no-check-base"
        )
    return "another base"
