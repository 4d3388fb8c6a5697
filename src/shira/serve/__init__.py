# SPDX-License-Identifier: Apache-2.0
"""Serving engines: adapters loaded and switched in place while a server runs.

Nothing here is imported before it is asked for; only the files called ``vllm`` import an engine.

Engine-neutral, in a worker::

    placement       where an entry of a checkpoint's weight lives
    processes       all processes of a model agree or none changes
    loading         an adapter, placed and compared with the base
    worker          a worker's adapters, what is active, new values for them
    value_sender    new values at the same positions, and their way to the workers

For vLLM: ``vllm`` is the extension of its workers, ``client`` (with ``async_client``) drives it
through ``LLM`` and ``AsyncLLM``; below them ``reports``, ``watch``, ``shared`` and ``gate``.
``journal`` and ``restoring`` give a new engine what a lost one held, ``supervisor`` starts a server
again.
``vllm_endpoints`` with ``http`` and ``scheduler`` adds adapters to its server, ``vllm_transfer``
takes values in, ``export`` gives patches of vLLM's own. For transformers' continuous batching:
``continuous_batching``.
"""
