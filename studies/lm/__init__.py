# SPDX-License-Identifier: Apache-2.0
"""What SmolLM2-135M learns of new texts and tasks, and what it forgets, method by method.

The protocol is described in ``docs/study-lm.md``::

    protocol.py   what is compared: targets, methods, rates, and all that is held equal
    base.py       the base model: conversion, loading, and packing for another machine
    data.py       texts and questions as rows of token ids
    scores.py     masks that are not built in
    renew.py      positions chosen anew during training
    methods.py    the base model with each method in it, at equal trained parameters
    train.py      one run: adapt, train, measure
    runs.py       results/*.jsonl: one run a line, only ever appended to
    plan.py       which runs are missing, in which order; rates, finalists, equal gain
    tables.py     the committed runs as tables
    document.py   tables and figures put into docs/study-lm.md

``python -m studies.lm`` rebuilds the page; ``look``, ``tune`` and ``run`` make missing runs.
"""
