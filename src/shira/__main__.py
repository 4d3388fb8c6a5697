# SPDX-License-Identifier: Apache-2.0
"""``python -m shira``: the command line, for where its script is not on the path."""

from shira.cli import main

if __name__ == "__main__":
    main()
