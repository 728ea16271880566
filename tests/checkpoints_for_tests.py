"""Checkpoints of modules that nobody trained."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from mmdit.processes import Processes
from mmdit.registry import describe
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver


def write_checkpoint(
    run: Path, step: int, modules: Mapping[str, nn.Module], *, finished: bool = True
) -> None:
    """A run's only checkpoint, of modules by their groups: 'raw', 'ema'."""
    with Saver(run, Processes(), keep=Retention(last=1), config={}) as saver:
        saver.save(
            step=step,
            finished=finished,
            tensors={name: module.state_dict() for name, module in modules.items()},
            descriptions={name: describe(module) for name, module in modules.items()},
            metrics={},
        )
