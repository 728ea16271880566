"""A small training that `test_accidents.py` lets accidents happen to.

`accident_process.py <run> <JSON>` trains once, alone or under torchrun. With a third word a child
trains, and after its death another one, without end: so PyTorch is imported once.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.engine.ema import EMA, ConstantDecay
from mmdit.engine.loggers import NoLogger
from mmdit.engine.loop import train
from mmdit.engine.optimizers import adamw
from mmdit.engine.schedules import WarmupConstant
from mmdit.engine.settings import Settings
from mmdit.engine.state import TrainState
from mmdit.processes import Processes, join, leave
from mmdit.runs.folder import RunFolder
from tests.engine.parallel_process import PARALLEL, Denoising


class Slow(Denoising):
    """Takes its time over each example, and for ever over one of them."""

    def __init__(self, pause: float = 0.0, hangs: bool = False) -> None:
        super().__init__()
        self.pause, self.hangs = pause, hangs

    def example(self, step: int, indices: Sequence[int]) -> tuple[Tensor, ...]:
        if self.hangs and step == 3:
            wait_for_nothing()
        time.sleep(self.pause)
        return super().example(step, indices)


def wait_for_nothing() -> None:
    """What the stack of a hung process must show."""
    time.sleep(1000)


def go(path: Path, given: dict[str, Any], processes: Processes) -> None:
    """Train once, up to `given["steps"]`."""
    task = Slow(given.get("pause", 0.0), hangs=given.get("hang") == processes.rank)
    ema = EMA(task.module, profile=ConstantDecay(decay=0.9, every=1))
    parallel = PARALLEL[given.get("parallel", "single")]()
    parallel.place(task.module, ema.module, device=torch.device("cpu"), dtype=torch.float32)
    run = RunFolder(path, held=processes.main)
    train(
        task,
        TrainState(
            task.module,
            ema=ema,
            optimizer=adamw(task.module, lr=1e-3),
            schedule=WarmupConstant(warmup_steps=3),
        ),
        run=run,
        settings=Settings(
            steps=given["steps"],
            batch_size=8,
            clip=1.0,
            log_every=1,
            evaluate_every=10**9,
            save_every=3,
            keep=2,
            workers=given.get("workers", 0),
            timeout=given.get("timeout", 100),
        ),
        seed=0,
        logger=NoLogger(),
        processes=processes,
        parallel=parallel,
    )
    run.close()


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    torch.set_num_threads(1)
    path, given, again = Path(sys.argv[1]), json.loads(sys.argv[2]), len(sys.argv) > 3
    if again:  # what is imported at a first step, once
        go(path.with_name("first"), {"steps": 3}, Processes())
    while again:
        child = os.fork()
        if child == 0:
            os.write(1, f"child {os.getpid()}\n".encode())
            go(path, given, Processes())
            os._exit(0)
        os.waitpid(child, 0)
        os.write(1, b"ended\n")
    processes = join(torch.device("cpu"), timeout=given.get("timeout", 100))
    go(path, given, processes)
    leave()


if __name__ == "__main__":
    main()
