"""Stopping a run: by a signal after the current step, or by a time limit on a step that hangs."""

import faulthandler
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Self

from mmdit.runs.checkpoint import Checkpoint


class Interrupted(Exception):
    """The run was stopped by a signal, after saving a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name} after step {checkpoint.step}; saved in {checkpoint.folder}")
        self.checkpoint, self.number = checkpoint, number


class Signals:
    """Context manager that records signals, for the training loop to check after each step.

    SIGUSR1 announces that a batch system will stop the job (sbatch --signal=USR1@120), and SIGHUP
    that the terminal was closed; if SIGHUP is ignored already, as under nohup, it stays ignored. A
    second signal of the same kind has its usual effect and ends the process at once, except for
    SIGHUP, which a closing terminal may send several times. SIGQUIT (Ctrl-\\) always ends the
    process at once, without saving.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __enter__(self) -> Self:
        self.received: int | None = None
        kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        wanted = [number for number in self.NUMBERS if number not in kept]
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        hangup = number == signal.SIGHUP
        signal.signal(number, signal.SIG_IGN if hangup else self._before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if self.received != number or number != signal.SIGHUP:
                signal.signal(number, handler)

    def flags(self) -> list[float]:
        """1 for the signal this process received, 0 for the others; in the order of `NUMBERS`."""
        return [float(number == self.received) for number in self.NUMBERS]

    def agreed(self, flags: Sequence[float]) -> int | None:
        """A signal that any process received, given the sums of their flags; None if none did."""
        counts = zip(self.NUMBERS, flags, strict=False)
        return next((int(number) for number, count in counts if count), None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the process if the block takes longer, printing the stack of every thread to stderr.

    A step that hangs (in a collective that another process never joins, or in a file system) would
    otherwise occupy its machines for ever. Under `torchrun` the end of one process ends all.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
