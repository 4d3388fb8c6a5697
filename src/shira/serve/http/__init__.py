# SPDX-License-Identifier: Apache-2.0
"""Adapters over HTTP; `shira.serve.vllm_endpoints` puts them into vLLM's server.

``service`` has the adapters, ``names`` keeps what clients name inside one folder, ``routes`` are
the service's own, ``turns`` is the middleware. Nothing here imports an engine or a web framework.
"""
