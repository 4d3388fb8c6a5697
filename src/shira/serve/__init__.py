# SPDX-License-Identifier: Apache-2.0
"""Serving engines: adapters loaded and switched in place while a server runs.

Engine-neutral: ``boxes`` and ``placement`` find where an entry of a checkpoint's weight lives on a
rank, ``exchange`` and ``held`` keep one rank's adapters and what undoes them, ``ranks`` lets all
ranks agree or none change; ``scheduler`` gives each adapter its turn. For vLLM: ``vllm`` is the
extension of its workers, ``client`` drives it through ``LLM`` and ``AsyncLLM``,
``vllm_endpoints`` with ``http`` adds adapters to its server. For transformers' continuous batching:
``continuous_batching``. Nothing here is imported before it is asked for.
"""
