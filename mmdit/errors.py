"""The one exception type that marks a user's mistake."""

import errno
import io
import os
import traceback
from pathlib import Path

from mmdit.printable import printable

LONGEST_LINE = 5_000  # characters of a message; a value in it may have millions


class UserError(ValueError):
    """A user's mistake: its message is printed with no traceback, and the exit code is 2.

    Args:
        lines: of the message, usually one. Line breaks and other control characters in them come
            from outside, as parts of names and values, and are escaped; what is longer than any
            message is cut in its middle.
    """

    def __init__(self, *lines: object) -> None:
        super().__init__(*(_shortened(printable(line)) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


def _shortened(line: str) -> str:
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


class NotFinite(UserError):
    """Values came out NaN or infinite; the message names the stage and what to try."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, which is often a page; its type if it has none."""
    if isinstance(error, KeyError):  # whose message is the key alone
        return f"{error} is missing"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# What a file system says of a path that somebody named: no bug, wherever it shows.
NOT_OURS = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "ENAMETOOLONG", "ELOOP"),
        *("EIO", "ESTALE", "ENODEV", "ENXIO", "ETIMEDOUT", "EREMOTEIO", "EHOSTDOWN", "ENOTCONN"),
        *("ENOTDIR", "EISDIR", "ENOTEMPTY", "EBUSY", "ETXTBSY", "EXDEV", "EMLINK", "ENOLCK"),
        *("EMFILE", "ENFILE", "EOPNOTSUPP"),
    )
    if hasattr(errno, name)
}


def path_trouble(error: OSError) -> str | None:
    """One line on what the file system says of a path; None if that is not what failed.

    An error of reading or writing an open file names no path: it is that of the function that was
    at it.
    """
    if error.errno not in NOT_OURS:
        return None
    why = (error.strerror or type(error).__name__).lower()
    if error.filename is not None:
        paths = [os.fsdecode(p) for p in (error.filename, error.filename2) if p is not None]
        return printable(f"{' -> '.join(paths)}: {why}")
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, Path):
                return printable(f"{value}: {why}")
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", 0), str):
                return printable(f"{name}: {why}")
    return None
