# SPDX-License-Identifier: Apache-2.0
"""What ``shira merge``, ``unmerge``, ``extract`` and ``convert`` share and how they print."""
