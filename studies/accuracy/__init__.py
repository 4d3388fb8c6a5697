# SPDX-License-Identifier: Apache-2.0
"""Is SHiRA as good as LoRA? A small encoder, five tasks, thirteen methods, rates tuned for each.

``make study`` rebuilds every table and figure from the committed runs and says which are missing;
``make study RUN=1`` makes the missing ones. The protocol is described in ``docs/study.md``::

    protocol.py   what is compared: tasks, methods, sizes, rates, and all that is held equal
    data.py       rows, the validation split, tokens
    methods.py    the base model with each method in it, at equal trained parameters
    train.py      one run: train, then measure
    metrics.py    accuracy and Matthews correlation
    runs.py       results/*.jsonl: one run a line, only ever appended to
    plan.py       which runs are missing, in which order
    tables.py     the committed runs as tables
    figures.py    and as pictures
    document.py   both put into docs/study.md
"""
