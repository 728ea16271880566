"""Signals that ask a run to stop, and steps that never end."""

import faulthandler
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Self

from mmdit.runs.checkpoint import Checkpoint


class Interrupted(Exception):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, checkpoint: Checkpoint, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name} after step {checkpoint.step}; saved in {checkpoint.folder}")
        self.checkpoint, self.number = checkpoint, number


class Signals:
    """Turns signals that ask for an end into a wish that the loop looks at after each step.

    SIGUSR1 is how batch systems announce that they will stop a job (sbatch --signal=USR1@120), and
    SIGHUP is what a closed terminal sends; where it is ignored, as under nohup, it stays so. A
    second signal of the same kind does what it did before: it ends the process at once; but a
    closed terminal may send several. SIGQUIT (Ctrl-\\) always ends it at once, unsaved.
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
        """1 for the signal received, 0 for the others."""
        return [float(number == self.received) for number in self.NUMBERS]

    def agreed(self, flags: Sequence[float]) -> int | None:
        """Of the sums of all processes' flags: a signal that any of them received."""
        counts = zip(self.NUMBERS, flags, strict=False)
        return next((int(number) for number, count in counts if count), None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the process, with the stack of every thread on stderr, if the block takes longer.

    A step that hangs (in a collective that another process never joins, in a file system) would
    otherwise hold its machines for ever. Under `torchrun` the end of one process ends all.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
