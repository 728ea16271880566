"""What each step needs, read ahead: in worker processes, or in this one.

Which samples a step sees is decided by position alone. The batch of step n lies at positions
n * batch_size, ...; it is cut into parts, one for each process and accumulation step. So neither
the number of processes, nor that of workers, nor how a batch is accumulated, nor a restart changes
what is seen, and there is no state to save.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from mmdit.data.order import Order
from mmdit.engine.advice import setting
from mmdit.errors import UserError, first_line
from mmdit.printable import logger
from mmdit.processes import Processes

log = logger(__name__)

Make = Callable[[int, Sequence[int]], Any]  # (step, sample indices) -> an example on the CPU


class Part(NamedTuple):
    """One process's share of a batch, or of an accumulation step of it."""

    step: int
    indices: list[int]
    example: Any  # whatever the task makes of them


class _Examples(Dataset[Part | UserError]):
    def __init__(self, make: Make) -> None:
        self.make = make

    def __getitem__(self, request: tuple[int, list[int]]) -> Part | UserError:
        step, indices = request
        try:
            return Part(step, indices, self.make(step, indices))
        except UserError as error:  # raised in a worker, it would arrive with a traceback as text
            return error


class Loader:
    """Iterates over steps.

    Attributes:
        waited: seconds that training has waited for data.

    Args:
        make: makes an example; with workers it runs in a forked process, which must not touch the
            accelerator.
        order: positions -> sample indices.
        batch_size: samples of a step, over all processes.
        accumulation: parts that a process makes its share of a step in.
        workers: processes that prepare examples for this one; 0 is this process itself.
        ahead: steps that each worker is ahead.
        pin: whether examples go to page-locked memory, from which a GPU copies faster.
        section: of the config, whose keys messages name.

    Raises:
        UserError: the batch cannot be shared evenly.
    """

    DEATHS = 3  # of workers in a row, without an example between them, that end the run

    def __init__(
        self,
        make: Make,
        order: Order,
        *,
        batch_size: int,
        processes: Processes,
        accumulation: int = 1,
        workers: int = 0,
        ahead: int = 2,
        pin: bool = False,
        section: str = "training",
    ) -> None:
        self.examples, self.order = _Examples(make), order
        self.batch_size, self.size = batch_size, share(batch_size, processes, accumulation)
        self.processes, self.accumulation = processes, accumulation
        self.workers, self.ahead, self.pin = workers, ahead, pin
        self.section = section
        self.waited = 0.0

    def requests(self, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
        """Step and sample indices of each part of this process."""
        for step in range(start, stop):
            for i in range(self.accumulation):
                number = i * self.processes.world_size + self.processes.rank
                position = step * self.batch_size + number * self.size
                yield step, self.order(position, self.size)

    def __call__(self, start: int, stop: int) -> Iterator[list[Part]]:
        """The parts of each step from `start` up to `stop`."""
        parts: list[Part] = []
        for part in self._restarted(start, stop):
            parts.append(part)
            if len(parts) == self.accumulation:
                yield parts
                parts = []

    def _restarted(self, start: int, stop: int) -> Iterator[Part]:
        """Every part once; a worker that was killed is replaced, and its parts are made again."""
        made, deaths = 0, 0
        while True:
            try:
                for part in self._parts(start, stop, made):
                    yield part
                    made, deaths = made + 1, 0
                return
            except WorkerDied as error:
                deaths += 1
                if deaths == self.DEATHS:
                    raise UserError(
                        f"{deaths} loader workers died in a row before step "
                        f"{start + made // self.accumulation} ({error}): if memory ran out, lower "
                        f"{self.section}.workers; with {setting(self.section, 'workers', 0)} the "
                        "cause shows"
                    ) from error
                log.warning("%s; its work is done again by new workers", error)

    def _parts(self, start: int, stop: int, made: int) -> Iterator[Part]:
        first, skipped = start + made // self.accumulation, made % self.accumulation
        requests = self.requests(first, stop)
        for _ in range(skipped):
            next(requests)
        parts = iter(
            DataLoader(
                self.examples,
                sampler=requests,  # any iterable is one
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=self.ahead if self.workers else None,
                worker_init_fn=_start_worker if self.workers else None,
                pin_memory=self.pin,
            )
        )
        # PyTorch would raise at a worker's death wherever this process is, in the middle of an
        # update too. Without its handler the death is noticed when the next part is asked for.
        if self.workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            began = time.perf_counter()
            try:
                part = next(parts)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:
                if self.workers and told_of_death(error):
                    raise WorkerDied(f"a loader worker died: {first_line(error)}") from error
                raise
            self.waited += time.perf_counter() - began
            if isinstance(part, UserError):
                raise part
            yield part


def share(batch_size: int, processes: Processes, accumulation: int) -> int:
    """How many samples of a batch a process computes at a time.

    Raises:
        UserError: they cannot be shared evenly.
    """
    shares = processes.world_size * accumulation
    if batch_size % shares:
        raise UserError(
            f"batch_size {batch_size} must be divisible by {processes.world_size} processes x "
            f"accumulation {accumulation}"
        )
    return batch_size // shares


class WorkerDied(Exception):
    """A worker process was killed."""


def told_of_death(error: Exception) -> bool:
    """Whether this is how PyTorch tells of a dead worker, and no error that a worker raised.

    The death is found by looking after it, or because the tensors that it held open are gone.
    """
    raised_in_worker = "Caught " in str(error) and "in DataLoader worker process" in str(error)
    looked_after = "DataLoader worker" in str(error) and "exited unexpectedly" in str(error)
    gone = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
    return not raised_in_worker and (looked_after or gone)


def _start_worker(_: int) -> None:
    """Signals are for the main process, which ends its workers when it ends."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
