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


STOPPED = "stopped; what was finished is kept, run the same command to continue"
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def run_tool(main: Callable[[], None], said: str = "error") -> None:
    """Run a tool: a `UserError`, or a file that cannot be read or written, becomes one line on stderr, exit code 2."""
    console.take()
    try:
        with console.interruptible():
            main()
    except UserError as error:
        print(f"{said}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{said}: {of_a_file(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(INTERRUPTED)


def of_a_file(error: OSError) -> str:
    """The sentence about a file that cannot be read or written. Raises `error` again where it is of no file."""
    if error.filename is None:
        raise error
    remedy = _REMEDIES.get(error.errno, "look at it")
    return f"{printable(error.filename)}: {error.strerror}; {remedy}, then repeat the command"
