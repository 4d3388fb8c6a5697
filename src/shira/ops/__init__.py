# SPDX-License-Identifier: Apache-2.0
"""Arithmetic at a support: products with the adapters inside the weight, and their gradients.

``tests/ops/reference.py`` says what each op does in plain torch; all are tested against it. Above
``delta``, below ``tuner``.
"""

from __future__ import annotations

from shira.ops.delta_product import looked_up, sparse_product
from shira.ops.functional import (
    adapted_weight,
    conv2d,
    convolution,
    embedding,
    linear,
    value_gradients,
)
from shira.ops.gradient import Choice, choose, set_scratch_bytes, use_backend, weight_gradient
from shira.ops.mixed_batch import DeltaGroups, add_products
from shira.ops.plan import Plan, make_plan, plan_for
from shira.ops.resident import resident
from shira.ops.stack import grouped, pieces_of

__all__ = [
    "Choice",
    "DeltaGroups",
    "Plan",
    "add_products",
    "adapted_weight",
    "choose",
    "conv2d",
    "convolution",
    "embedding",
    "grouped",
    "linear",
    "looked_up",
    "make_plan",
    "pieces_of",
    "plan_for",
    "resident",
    "sparse_product",
    "set_scratch_bytes",
    "use_backend",
    "value_gradients",
    "weight_gradient",
]
