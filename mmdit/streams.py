"""Standard output whose reader may go away: `python sample.py ... | head -1`, a closed terminal."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ESHUTDOWN)
SIGPIPE_CODE = 141  # 128 + SIGPIPE: how shells tell of a command whose reader has gone


@contextlib.contextmanager
def guarded(goes_on: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Let the block end quietly where nobody reads what it prints.

    Its exit code is then 141, or 2 where the output cannot be written for another reason, such as a
    full disk, which is told in one line.

    Args:
        goes_on: whether the block's work matters more than what it prints; then a line on the other
            stream is all that happens.
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
    """A text stream that never raises an OSError, which logging would print page by page."""

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
        """Print nothing there any more, and end the process or go on."""
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
