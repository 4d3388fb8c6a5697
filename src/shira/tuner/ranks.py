# SPDX-License-Identifier: Apache-2.0
"""The former place of `shira.tuner.check_ranks`, by which scripts call it."""

from __future__ import annotations

from shira.tuner.indices import check_ranks

__all__ = ["check_ranks"]
