"""The processes of one run, as `torchrun` starts them: who I am, and how we agree.

One process needs no `torchrun`; everything here then costs nothing. Tensors of the model travel by
the backend of their device. What is said here travels by gloo, on the CPU.
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
        rank: of this process, from 0.
        world_size: how many there are.
        group: over which CPU tensors and plain objects travel; None for a single process.
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
        """Return when all have come here."""
        if self.group is not None:
            dist.barrier(self.group)

    def broadcast(self, value: T) -> T:
        """What the main process gives, in every process; a plain object."""
        if self.group is None:
            return value
        held = [value if self.main else None]
        dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]  # type: ignore[return-value]

    def once(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process, in every process: for what takes long.

        It is called by all processes at the same point, and its result must pickle.
        """
        made = make() if self.main else None
        return self.broadcast(made)  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """What each process gives, in the order of ranks; plain objects."""
        if self.group is None:
            return [value]
        held: list[Any] = [None] * self.world_size
        dist.all_gather_object(held, value, group=self.group)
        return held

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes of a CPU tensor."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block alone; then the others do, and find its work done."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()


def join(device: torch.device, timeout: float) -> Processes:
    """Meet the other processes that `torchrun` started; alone where it started none.

    Args:
        device: of this process; see `own_device`.
        timeout: seconds until an exchange of tensors that nobody answers ends the run.
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
    # One process may rightly be busy for hours (a stage, a checkpoint) while others wait here.
    group = dist.new_group(backend="gloo", timeout=A_DAY)
    return Processes(dist.get_rank(), world_size, group)


def leave() -> None:
    """Take leave of the others, as PyTorch asks at the end of a process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether this only tells that another process has gone, which knows why."""
    by_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return by_gloo or isinstance(error, dist.DistError)


def give_way(error: BaseException, *, mistake: bool) -> None:
    """Let one process tell of a failure for all, where `torchrun` started several.

    It ends all when one has ended, and so this one while it waits. Of a user's mistake, which all
    make, the main process tells; of a process that has gone, that one. A minute is long enough for
    them: on a busy machine one process may import its modules many seconds after another.
    """
    others_tell = is_lost(error) or (mistake and os.environ.get("RANK") != "0")
    if "TORCHELASTIC_RUN_ID" in os.environ and others_tell:
        time.sleep(60)


def tell_torchrun(message: str) -> None:
    """Have the page that `torchrun` ends with say why, too."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def restart_remarks(words: Sequence[str]) -> list[str]:
    """What keeps a run from going on when `torchrun --max-restarts` starts its processes again.

    Args:
        words: of the command line.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return []
    remarks = []
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= (2, 13) and os.environ.get(STORE_SWITCH, "0") != "1":
        remarks.append(
            f"torchrun --max-restarts never recovers under torch {torch.__version__}, whose "
            f"restarted processes meet at a store that is gone: start it with {STORE_SWITCH}=1"
        )
    if not any(word.partition("=")[0] == "resume" for word in words):
        remarks.append(
            "torchrun --max-restarts gives the same command again, which begins a new run: add "
            "resume=auto, and a restart goes on from the last checkpoint"
        )
    return remarks


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs of a machine, its own.

    Raises:
        UserError: there are more processes than GPUs.
    """
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    mine, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if mine >= count:
        raise UserError(
            f"process {mine} of this machine has no GPU: it has {count}; start as many processes "
            f"(torchrun --nproc_per_node={count})"
        )
    torch.cuda.set_device(mine)
    return torch.device("cuda", mine)
