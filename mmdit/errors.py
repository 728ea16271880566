"""What marks a user's mistake."""


class UserError(ValueError):
    """A user's mistake: its message is printed as is, with no traceback, and the exit code is 2."""


def at_least_one(owner: str, **counts: int) -> None:
    """Raise UserError, naming the owner and the first of its counts that is below 1, if any is."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{owner}: {name} {count} must be at least 1")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, which is often a page; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
