"""The one exception type that marks a user's mistake."""


class UserError(ValueError):
    """A user's mistake: its message is printed as is, with no traceback, and the exit code is 2."""
