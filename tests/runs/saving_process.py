"""One of several processes that save and load a sharded model, for `test_saving_distributed.py`.

`saving_process.py <what>=<run folder> ...`, under torchrun; alone, `act` is called directly.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmdit.errors import UserError
from mmdit.processes import Processes, join, leave
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver


class Odd(nn.Module):
    """Weights that two processes cannot split evenly, and a replicated buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 1)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        self.register_buffer("table", torch.arange(6.0))


def build(shards: bool, replicas: int = 1) -> Odd:
    module = Odd()
    if shards:
        size = dist.get_world_size()
        mesh = init_device_mesh(
            "cpu", (replicas, size // replicas), mesh_dim_names=("replicas", "shards")
        )
        fully_shard(module.first, mesh=mesh if replicas > 1 else mesh["shards"])
        fully_shard(module, mesh=mesh if replicas > 1 else mesh["shards"])
    return module


def tensors(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A group of weights, and an optimizer group: moments shaped like the weights, and counts."""
    weights = module.state_dict()
    moments = {f"{key}:exp_avg": value * 2 for key, value in weights.items()}
    return {"raw": weights, "optimizer": {**moments, "step": torch.tensor(3.0)}}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def act(what: str, run: Path, processes: Processes) -> dict[str, object]:
    """Do something with the checkpoints of a run, and report the result."""
    module = build(processes.world_size > 1 and what != "save_plain", 1 + (what == "save_replicas"))
    report: dict[str, object] = {"dtensor": isinstance(module.first.weight, DTensor)}
    with Saver(run, processes, keep=Retention(last=3), config={}) as saver:
        if what.startswith("save"):
            save(saver, 5, module)
            with torch.no_grad():
                for weight in module.parameters():
                    weight.zero_()
            report["step"] = saver.wait().step
        elif what == "load":
            report |= load(saver, module)
        else:
            save(saver, 4, module)
            saver.wait()
            report |= save_on_a_full_disk(saver, module)
            report["there"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    return report


def save(saver: Saver, step: int, module: Odd) -> None:
    saver.save(step=step, finished=True, tensors=tensors(module), descriptions={}, metrics={})


def load(saver: Saver, module: Odd) -> dict[str, object]:
    found = saver.latest()
    assert found is not None
    target = tensors(module)
    wanted = {k: {n: whole(t).clone() for n, t in group.items()} for k, group in target.items()}
    for group in target.values():
        for tensor in group.values():
            tensor.zero_()
    saver.load(found, target)
    equal = [torch.equal(whole(target[k][n]), wanted[k][n]) for k in wanted for n in wanted[k]]
    facts = saver.facts(found, "optimizer")
    return {"equal": all(equal), "facts": {name: list(fact.shape) for name, fact in facts.items()}}


def save_on_a_full_disk(saver: Saver, module: Odd) -> dict[str, object]:
    """Simulate a full disk in the second process."""
    fsync = os.fsync

    def full(handle: int) -> None:
        if saver.processes.rank == 1:
            raise OSError(28, "No space left on device")
        fsync(handle)

    os.fsync = full
    save(saver, 5, module)
    report: dict[str, object] = {}
    try:
        saver.wait()
    except UserError as error:
        report["error"] = str(error)
    os.fsync = fsync
    found = saver.latest()
    return {**report, "latest": None if found is None else found.step}


if __name__ == "__main__":
    together = join(torch.device("cpu"), timeout=60)
    for word in sys.argv[1:]:
        wish, _, folder = word.partition("=")
        reports = together.gather(act(wish, Path(folder), together))
        if together.main:
            print(json.dumps(reports), flush=True)
    leave()
