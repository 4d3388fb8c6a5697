# SPDX-License-Identifier: Apache-2.0
"""Studies: what was measured about learning, as `benchmarks` holds what was measured about speed."""
