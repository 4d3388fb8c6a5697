# SPDX-License-Identifier: Apache-2.0
"""What `shira report` is made of.

``gather`` reads adapters and measures them, ``curve`` reads a training log, ``maps`` makes the heat
maps; ``charts`` and ``sections`` turn that into markup with ``html``, and ``page`` into one page.
"""
