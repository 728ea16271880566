"""What `test_parallel.py` starts under torchrun: trains as each line of a plan says.

The plan is a JSON file: a list of {"name", "parallel", "steps", and settings}. Every process writes
the sample indices of its parts to `<name>/indices_<rank>.json`; losses are in `metrics.jsonl`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmdit.data.order import Order, ShuffledOrder
from mmdit.engine.activations import recompute
from mmdit.engine.ema import EMA, ConstantDecay
from mmdit.engine.loggers import NoLogger
from mmdit.engine.loop import train
from mmdit.engine.optimizers import adamw, muon
from mmdit.engine.parallel import DDP, FSDP, Single
from mmdit.engine.posthoc import PostHoc
from mmdit.engine.schedules import WarmupConstant
from mmdit.engine.settings import Settings
from mmdit.engine.state import TrainState
from mmdit.engine.tasks import Work
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.models.mmdit import MMDiT
from mmdit.processes import Processes, join, leave
from mmdit.registry import register
from mmdit.runs.folder import RunFolder

PARALLEL = {
    "single": Single,
    "ddp": DDP,
    "fsdp": FSDP,
    "hsdp": lambda: FSDP(replicas=2),
}
OPTIMIZERS = {"adamw": adamw, "muon": muon}


@register
class Parts(nn.Module):
    """A network beside a frozen part and a trained one, as a pipeline has them."""

    def __init__(self, *, depth: int = 2) -> None:
        super().__init__()
        self.mmdit = MMDiT(
            depth=depth,
            width=24,
            num_heads=2,
            latent_channels=4,
            context_width=12,
            pooled_width=10,
            position_size=8,
            position_grid=4,
        )
        self.text = nn.Linear(12, 12)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


class Denoising:
    """Predicts noise from itself; inputs are keyed by (step, sample)."""

    protocol: ClassVar[dict[str, str | int]] = {"protocol": "denoising"}
    higher_is_better: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, poison: Sequence[int] | None = None) -> None:
        torch.manual_seed(0)
        self.module = Parts()
        for weight in self.module.parameters():  # no gate is closed, so that all matters
            nn.init.normal_(
                weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel())
            )
        self.poison = poison  # (step, sample index) of an input that is not finite
        self.seen: list[tuple[int, list[int]]] = []

    def order(self, *, batch_size: int, seed: int) -> Order:
        return ShuffledOrder(size=20, seed=seed)

    def example(self, step: int, indices: Sequence[int]) -> tuple[Tensor, ...]:
        draws = [generator_for("x", step, index) for index in indices]
        x = torch.stack([torch.randn(4, 4, 4, generator=g) for g in draws])
        if self.poison is not None and step == self.poison[0] and self.poison[1] in indices:
            x[list(indices).index(self.poison[1])] = float("inf")
        c = torch.stack([torch.randn(5, 12, generator=g) for g in draws])
        t = torch.stack([torch.rand((), generator=g) for g in draws])
        numbers = torch.tensor(list(indices))
        return x, c, t, numbers, torch.full_like(numbers, step)

    def loss(self, example: tuple[Tensor, ...]) -> Tensor:
        x, c, t, numbers, steps = example
        self.seen.append((int(steps[0]), numbers.tolist()))
        told = self.module.text(c)
        output = self.module.mmdit(x, t, told[:, 0, :10], told)
        return (output.float() - x).square().flatten(1).mean(1)

    def times(self, example: tuple[Tensor, ...]) -> Tensor:
        return example[2]

    def figures(self) -> dict[str, float]:
        return {}

    def work(self, example: tuple[Tensor, ...]) -> Work:
        return Work()

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            example = self.example(-1, range(4))
            before, self.module = self.module, module  # type: ignore[assignment]
            loss = self.loss(example).mean().item()
            self.module = before
        self.seen.pop()
        return {"loss": loss}

    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        return torch.zeros(1, 32, 32, 3, dtype=torch.uint8), ["nothing"]


def go(folder: Path, processes: Processes, plan: dict[str, Any]) -> None:
    """Train as one line of the plan says."""
    task = Denoising(plan.get("poison"))
    ema = EMA(task.module, profile=ConstantDecay(decay=0.9, every=1))
    recompute(task.module, plan.get("activations", "none"))
    parallel = PARALLEL[plan["parallel"]]()
    device = torch.device("cpu")
    parallel.place(task.module, ema.module, device=device, dtype=torch.float32)
    path = folder / plan.get("folder", plan["name"])
    run = RunFolder(path, held=processes.main)
    settings = Settings(
        steps=plan.get("steps", 20),
        batch_size=8,
        clip=1.0,
        log_every=1,
        evaluate_every=100,
        save_every=plan.get("save_every", 100),
        keep=2,
        accumulation=plan.get("accumulation", 1),
        workers=plan.get("workers", 0),
    )
    told = ""
    try:
        train(
            task,
            TrainState(
                task.module,
                ema=ema,
                optimizer=OPTIMIZERS[plan.get("optimizer", "adamw")](task.module, lr=1e-3),
                schedule=WarmupConstant(warmup_steps=3),
                posthoc=PostHoc(task.module, sigma_rels=[0.1], snapshot_every=10),
            ),
            run=run,
            settings=settings,
            seed=0,
            logger=NoLogger(),
            processes=processes,
            parallel=parallel,
        )
    except UserError as error:
        told = str(error)
    run.close()
    report = {"seen": task.seen, "told": told}
    (path / f"{plan['name']}_{processes.rank}.json").write_text(json.dumps(report))


def main(folder: Path) -> None:
    processes = join(torch.device("cpu"), timeout=120)
    torch.set_num_threads(1)
    for plan in json.loads((folder / f"plan_{processes.world_size}.json").read_text()):
        go(folder, processes, plan)
        processes.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
