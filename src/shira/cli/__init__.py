# SPDX-License-Identifier: Apache-2.0
"""The command line: `main` is what ``shira`` and ``python -m shira`` run.

The top of the tree: it may use all of shira, nothing imports it. One file a subcommand, listed in
`shira.cli.app`; each imports what is heavy (torch, transformers, PEFT) only when it runs, so that
``shira --help`` answers at once.

A mistake of the user's ends in one line, ``error: ...``, on standard error and exit status 2;
``--debug`` shows the traceback instead. Exit status 1 means that the work was done and its result
is bad, such as a proof of ``shira demo`` that failed.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

from shira.errors import ShiraError, shown

__all__ = ["main"]

_LONGEST = 4000  # characters of a message
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        argv: The arguments; ``None`` takes those of the process.

    Raises:
        SystemExit: Always, with the exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        try:
            from shira.cli.app import run
            from shira.cli.output import plain_messages
        except ImportError as error:
            _fail(f"the command line needs {error.name}: pip install 'shira[cli]'")
        plain_messages()
        run(arguments)
    except ShiraError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:
        if debug or (error.filename is None and error.errno not in _OF_THE_DISK):
            raise
        _fail(f"{error.filename or 'writing'}: {error.strerror}")
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    message = " ".join(message.split())
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} ... ({len(message)} characters)"
    print("error:", shown(message), file=sys.stderr)
    sys.exit(2)
