"""Standard output whose reader may end: `python sample.py ... | head -1`, or a closed terminal."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ESHUTDOWN)
SIGPIPE_CODE = 141  # 128 + SIGPIPE: exit code that shells report for a broken pipe


@contextlib.contextmanager
def guarded(goes_on: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """End the block quietly when the reader of its output is gone.

    The exit code is then 141; or 2, with one line on standard error, if the output cannot be
    written for another reason, such as a full disk.

    Args:
        goes_on: whether the block should continue without its output; then one line on standard
            error is all that happens.
    """
    before = sys.stdout, sys.stderr
    if before[0] is not None:
        sys.stdout = _Guarded(before[0], "standard output", goes_on)
    if before[1] is not None:
        sys.stderr = _Guarded(before[1], "standard error", goes_on)
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Guarded:
    """A text stream that never raises an OSError, for which logging would print a traceback."""

    def __init__(self, stream: TextIO, name: str, goes_on: Callable[[], bool]) -> None:
        self._stream, self._name, self._goes_on = stream, name, goes_on

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Discard all further output, and end the process or go on."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        goes_on = self._goes_on()
        if error.errno not in GONE or goes_on:
            why = (error.strerror or type(error).__name__).lower()
            end = ": the run goes on without it" if goes_on else ""
            if self._name != "standard error":
                print(f"{self._name} cannot be written ({why}){end}", file=sys.stderr)
        if not goes_on:
            raise SystemExit(SIGPIPE_CODE if error.errno in GONE else 2)
