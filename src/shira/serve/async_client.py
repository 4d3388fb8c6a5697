# SPDX-License-Identifier: Apache-2.0
"""`AsyncClient`, by the name of a module of its own; it is in `shira.serve.client`."""

from shira.serve.client import AsyncClient

__all__ = ["AsyncClient"]
