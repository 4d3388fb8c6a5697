# SPDX-License-Identifier: Apache-2.0
"""Adapters put into any module's weights, exchanged and taken out: exact, in place, in O(k).

`Switch` is what users hold. Below it::

    targets     where an adapter's parameters are in a module, and whether they can be written to
    prepared    from deltas to patches, made beforehand
    weights     which adapters are in some weights, and the way to others: all weights, or none

`shira.ops.patch` writes. Sits above ``store`` and ``ops``; imports torch, numpy and safetensors,
never PEFT or transformers. `shira.serve` uses ``prepared`` and ``weights``, too.
"""

from __future__ import annotations

from shira.switch.switch import Switch

__all__ = ["Switch"]
