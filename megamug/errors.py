"""The one exception that means "the user can mend this".

The command line turns a `UserError` into one sentence on stderr and exit code 2, before any process group exists.
"""


class UserError(ValueError):
    """A mistake in configuration, data or arguments. The message says what is wrong, where, and what to do."""
