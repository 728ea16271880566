"""The processes of one run, as started by `torchrun`: rank, communication, failures.

A single process needs no `torchrun`; everything here then costs nothing. The model's tensors are
exchanged with the backend of their device. Everything here uses gloo, on the CPU.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmdit.errors import UserError

T = TypeVar("T")
A_DAY = timedelta(days=1)
STORE_SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class Processes:
    """All processes of a run.

    Attributes:
        rank: rank of this process, from 0.
        world_size: number of processes.
        group: process group for CPU tensors and plain objects; None for a single process.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.group is not None:
            dist.barrier(self.group)

    def broadcast(self, value: T) -> T:
        """The main process's value, in every process; a plain object."""
        if self.group is None:
            return value
        held = [value if self.main else None]
        dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]  # type: ignore[return-value]

    def once(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process only, and return its result in every process.

        All processes call this at the same point; the result must be picklable.
        """
        made = make() if self.main else None
        return self.broadcast(made)  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, sorted by rank; plain objects."""
        if self.group is None:
            return [value]
        held: list[Any] = [None] * self.world_size
        dist.all_gather_object(held, value, group=self.group)
        return held

    def total(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over all processes, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first; then in the others, which find its work done."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()


def join(device: torch.device, timeout: float) -> Processes:
    """Join the processes that `torchrun` started; without it, this process is alone.

    Args:
        device: device of this process; see `own_device`.
        timeout: seconds until a collective that another process does not join ends the run.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ:
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    # A process may legitimately wait for hours while another is busy with a stage or a checkpoint.
    group = dist.new_group(backend="gloo", timeout=A_DAY)
    return Processes(dist.get_rank(), world_size, group)


def leave() -> None:
    """Destroy the process groups, as PyTorch requires at the end of a process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether this error only says that another process has ended, which reports the cause."""
    by_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return by_gloo or isinstance(error, dist.DistError)


def wait_for_report(error: BaseException, *, mistake: bool) -> None:
    """Wait, under `torchrun`, if another process reports this failure; `torchrun` then ends all.

    A user's mistake, which all processes make, is reported by the main one; a process that has
    ended is reported by itself. A minute is long enough: on a busy machine one process may import
    its modules many seconds later than another.

    Args:
        error: the failure.
        mistake: whether it is a user's mistake.
    """
    reported_elsewhere = is_lost(error) or (mistake and os.environ.get("RANK") != "0")
    if "TORCHELASTIC_RUN_ID" in os.environ and reported_elsewhere:
        time.sleep(60)


def report_to_torchrun(message: str) -> None:
    """Include a message in the summary that `torchrun` prints when it ends."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def restart_remarks(words: Sequence[str]) -> list[str]:
    """Warnings about what prevents a run from resuming under `torchrun --max-restarts`.

    Args:
        words: the words of the command line.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return []
    remarks = []
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= (2, 13) and os.environ.get(STORE_SWITCH, "0") != "1":
        remarks.append(
            f"torchrun --max-restarts never recovers under torch {torch.__version__}, whose "
            f"restarted processes use a store that no longer exists: start it with {STORE_SWITCH}=1"
        )
    if not any(word.partition("=")[0] == "resume" for word in words):
        remarks.append(
            "torchrun --max-restarts repeats the same command, which starts a new run: add "
            "resume=auto, and a restart resumes from the last checkpoint"
        )
    return remarks


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs, the one of its local rank.

    Raises:
        UserError: there are more processes than GPUs.
    """
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    mine, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if mine >= count:
        raise UserError(
            f"process {mine} of this machine has no GPU: it has {count}; start {count} processes "
            f"(torchrun --nproc_per_node={count})"
        )
    torch.cuda.set_device(mine)
    return torch.device("cuda", mine)
