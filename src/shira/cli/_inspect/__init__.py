# SPDX-License-Identifier: Apache-2.0
"""What `shira inspect` is made of: reading, figures, the base checkpoint, the tables."""
