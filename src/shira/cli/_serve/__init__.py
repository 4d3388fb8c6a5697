# SPDX-License-Identifier: Apache-2.0
"""Parts of `shira serve`: ``child`` is the command and environment of vLLM's server."""
