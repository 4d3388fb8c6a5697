# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.reach [NAME ...]``: run the rows of these names, or all; write the page."""

from __future__ import annotations

import sys

from tests.reach.case import ROWS
from tests.reach.page import PAGE, answer, line, page, read


def main() -> None:
    made, asked = read(), sys.argv[1:]
    for row in ROWS:
        old = made.get(row.name)
        wanted = not asked or any(word in row.name for word in asked)
        if old is not None and (row.missing or not wanted):
            continue
        if row.missing:
            sys.exit(
                f"{row.name}: {', '.join(row.missing)} is not installed, and it has no line yet"
            )
        made[row.name] = line(row, answer(row))
        print(made[row.name], flush=True)
    PAGE.write_text(page(made))


if __name__ == "__main__":
    main()
