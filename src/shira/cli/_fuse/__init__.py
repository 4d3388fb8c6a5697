# SPDX-License-Identifier: Apache-2.0
"""What `shira fuse` and `shira overlap` share and are made of: adapters by path, tables, plots."""
