"""Saves checkpoints of a run endlessly; `test_saving.py` kills it and starts it again.

The parent starts one child after the other, so that PyTorch is imported once.
"""

import os
import sys
from itertools import count
from pathlib import Path

import torch

from mmdit.processes import Processes
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver


def tell(words: str) -> None:
    """A single write, so that a kill cannot truncate the line."""
    os.write(sys.stdout.fileno(), f"{words}\n".encode())


def write_on(run: Path, parent: int) -> None:
    """Continue from the newest checkpoint; all values in a checkpoint equal its step."""
    saver = Saver(run, Processes(), keep=Retention(last=2), config={})
    found = saver.latest()
    start = 0 if found is None else found.step
    if found is not None:
        assert (found.read("raw").tensors["w"] == start).all()
    tell(f"found {start} {os.getpid()}")
    for step in count(start + 1):
        if os.getppid() != parent:
            os._exit(1)  # the test is over
        weights = {"w": torch.full((300_000,), float(step))}
        saver.save(
            step=step,
            finished=False,
            tensors={"raw": weights, "ema": weights},
            descriptions={"raw": {}, "ema": {}},
            metrics={},
        )
        tell(f"saved {step}")


here = os.getpid()
while True:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        write_on(Path(sys.argv[1]), here)
    os.waitpid(child, 0)
    tell("ended")
