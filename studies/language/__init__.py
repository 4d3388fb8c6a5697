# SPDX-License-Identifier: Apache-2.0
"""What a small language model learns of a new kind of text, and what it forgets, method by method.

A small Llama trained from scratch on one text is adapted to three others::

    protocol.py   what is compared: texts, methods, rates, and all that is held equal
    data.py       texts as blocks and windows of token ids
    base.py       the tokenizer and the base model, made from the source text by a command
    methods.py    the base model with each method in it, at equal trained parameters
    train.py      one run: adapt, then measure target and source
    store.py      results/*.jsonl: one run a line, only ever appended to
    cells.py      the runs of a target and a method, and the rate they choose
    frontier.py   what is forgotten where methods have gained equally much
    plan.py       which runs are missing, in which order
    runner.py     make them, some at a time; stop and go on whenever you like
    tables.py     the committed runs as tables
    figures.py    and as a picture
    document.py   both put into docs/study-language.md

``make study`` rebuilds the page; ``make study RUN=1`` makes the missing runs first.
"""
