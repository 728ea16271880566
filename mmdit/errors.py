"""The one exception type that marks a user's mistake."""


class UserError(ValueError):
    """A user's mistake: its message is printed as is, with no traceback, and the exit code is 2."""


class NotFinite(UserError):
    """Values came out NaN or infinite; the message names the stage and what to try."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, which is often a page; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
