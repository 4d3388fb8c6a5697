# SPDX-License-Identifier: Apache-2.0
"""Serving engines: adapters loaded and switched in place while a server runs.

Engine-neutral: ``scheduler`` gives each adapter its turn. For transformers' continuous batching:
``continuous_batching``. Nothing here is imported before it is asked for.
"""
