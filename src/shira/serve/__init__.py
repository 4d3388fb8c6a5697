# SPDX-License-Identifier: Apache-2.0
"""Serving engines: adapters loaded and switched in place while a server runs.

Nothing here is imported before it is asked for; only the files called ``vllm`` import an engine.

In a worker::

    placement       where an entry of a checkpoint's weight lives
    loading         an adapter, placed and compared with the base
    beside          a load that goes on in a thread while the engine computes
    holding         which of a worker's adapters are in memory, within a bound
    worker          a worker's adapters, and what is active
    route           new values for an adapter, from a ``value_sender``
    mixed           several adapters in one batch, each added to the rows of its own requests
    vllm            the extension of vLLM's workers; ``vllm_transfer`` takes new values in

In a client or trainer, with ``messages`` between them and the workers::

    client                  drives the adapters of an engine, by the steps of ``changes``
    riders                  who is in flight with which adapters, and who waits for room
    journal, supervisor     give a new engine what a lost one held; start a server again
    value_sender            new values at the same positions
    export                  patches of vLLM's own

In a server: ``vllm_endpoints``, ``http`` and ``scheduler`` add adapters to vLLM's. For
transformers' continuous batching: ``continuous_batching``.
"""
