# SPDX-License-Identifier: Apache-2.0
"""Adapters put into any module's weights, exchanged and taken out: exact, in place, in O(k).

`Switch` is what users hold. Below it, each file one idea::

    targets    where an adapter's parameters are in a module, and whether they can be written to
    plan       from deltas to patches: what is written, made beforehand
    loaded     an adapter on a module
    layouts    weights that are cast or moved meanwhile
    apply      from one plan to another over all weights: everything, or nothing

`shira.ops.patch` writes. Sits above ``store`` and ``ops``; imports torch, numpy and safetensors,
never PEFT or transformers.
"""

from __future__ import annotations

from shira.switch.switch import Switch

__all__ = ["Switch"]
