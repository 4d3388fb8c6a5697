# SPDX-License-Identifier: Apache-2.0
"""What `shira demo` is made of: the text, the tasks, the training, the proofs, the tables."""
