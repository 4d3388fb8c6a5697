# SPDX-License-Identifier: Apache-2.0
"""Studies: measurements of what is learnt, as `benchmarks` holds those of speed and memory.

What they share: `study`, a kind of run, where its runs are kept and how they are made; `store`, a
run a JSON line; `runner`, which makes the missing ones; `tuning`, how a rate is chosen; `command`,
their command lines; `page`, which puts tables into the documentation.
"""
