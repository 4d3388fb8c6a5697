# SPDX-License-Identifier: Apache-2.0
"""What ``shira switch-bench`` is made of, and what the benchmark suite ``switching`` shares."""
