"""How a command-line tool runs: a mistake of its user is one sentence and exit code 2, not a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from megamug.command_line import console
from megamug.errors import UserError, printable

_REMEDIES = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room in your quota", errno.EROFS: "name another folder",
    errno.EACCES: "change its permissions", errno.EPERM: "change its permissions",
}  # fmt: skip


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool: a `UserError`, or a file that cannot be read or written, becomes one line on stderr, exit code 2."""
    console.take()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        remedy = _REMEDIES.get(error.errno, "look at it")
        print(f"error: {printable(error.filename)}: {error.strerror}; {remedy}, then repeat the command",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, run the same command to continue", file=sys.stderr)
        sys.exit(130)
