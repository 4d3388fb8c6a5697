# SPDX-License-Identifier: Apache-2.0
"""Studies: measurements of what is learnt, as `benchmarks` holds those of speed and memory.

What they share: `store`, a run a JSON line; `runner`, which makes the missing ones; `command`,
their command lines; `page`, which puts tables into the documentation.
"""
