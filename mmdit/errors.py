"""The one exception type that marks a user's mistake."""


class UserError(Exception):
    """A user's mistake: its message is printed as is, with no traceback, and the exit code is 2."""
