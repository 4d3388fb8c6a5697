# SPDX-License-Identifier: Apache-2.0
"""Adapters over HTTP, whatever the engine and the web framework.

``paths`` keeps what clients name inside one folder, ``errors`` writes errors as OpenAI's API does,
``service`` loads, unloads, activates and lists, ``turns`` is the ASGI middleware that reads the
``model`` of each request and lets it in when its adapter is active. ``durable`` is a service that a
journal restores. `shira.serve.vllm_endpoints` puts them into vLLM's server. Nothing here imports an
engine or a framework.
"""
