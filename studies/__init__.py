# SPDX-License-Identifier: Apache-2.0
"""Studies: measurements of what is learnt, as `benchmarks` holds those of speed and memory."""
