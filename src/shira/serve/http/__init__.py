# SPDX-License-Identifier: Apache-2.0
"""Adapters over HTTP, whatever the engine and the web framework.

``names`` keeps what clients name inside one folder, ``service`` loads, unloads, activates and
lists, and has it all again from a journal, ``routes`` answers the service's own routes and writes
errors as OpenAI's API does, ``turns`` is the ASGI middleware that reads the ``model`` of each
request and lets it in when its adapter is active. `shira.serve.vllm_endpoints` puts them into
vLLM's server. Nothing here imports an engine or a framework.
"""
