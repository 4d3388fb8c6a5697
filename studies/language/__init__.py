# SPDX-License-Identifier: Apache-2.0
"""What a small language model learns of a new kind of text, and what it forgets, method by method.

A small Llama trained from scratch on one text is adapted to three others::

    protocol.py   what is compared: texts, methods, rates, and all that is held equal
    data.py       texts as blocks and windows of token ids
    base.py       the tokenizer and the base model, made from the source text by a command
    methods.py    the base model with each method in it, at equal trained parameters
    train.py      one run: adapt, then measure target and source
    store.py      results/*.jsonl: one run a line, only ever appended to
    plan.py       which runs are missing, in which order
    runner.py     make them, some at a time; stop and go on whenever you like
"""
