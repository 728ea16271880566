"""The exception type for users' mistakes, and one-line messages for other errors."""

import errno
import io
import os
import traceback
from pathlib import Path

from mmdit.printable import printable

LONGEST_LINE = 5_000  # characters per line; a value in a message may have millions


class UserError(ValueError):
    """A user's mistake: the message is printed without a traceback, and the exit code is 2.

    Args:
        lines: lines of the message, usually one. Line breaks and other control characters in them
            come from names and values, and are escaped; a line that is too long is cut in the
            middle.
    """

    def __init__(self, *lines: object) -> None:
        super().__init__(*(_shortened(printable(line)) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


def _shortened(line: str) -> str:
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


class NotFinite(UserError):
    """Values are NaN or infinite; the message names the stage and suggests what to try."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, which may be long; its type if it has none."""
    if isinstance(error, KeyError):  # its message is only the key
        return f"{error} is missing"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# File-system errors about a path that the user named, which are never bugs.
FILE_SYSTEM_ERRORS = {
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
    """One-line message for an error of the file system; None for any other error.

    An error of reading or writing an open file does not name its path, which is then looked up in
    the local variables of the traceback.
    """
    if error.errno not in FILE_SYSTEM_ERRORS:
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
