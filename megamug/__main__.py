"""`python -m megamug train CONFIG.yaml`: one process. `torchrun --nproc-per-node N -m megamug train ...`: N of them."""

import os
import signal


def start() -> int:
    """The program `megamug`; returns its exit code. Ctrl-C while its own modules are read is no traceback either."""
    early = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if early:
        signal.signal(signal.SIGINT, lambda number, _frame: os._exit(128 + number))
    from megamug.cli import main

    if early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()


if __name__ == "__main__":
    raise SystemExit(start())
