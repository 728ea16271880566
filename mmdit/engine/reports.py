"""What a run tells: figures into `metrics.jsonl` and a logger, evaluations, pictures."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdit.atomic import write_atomically
from mmdit.engine.loader import Part
from mmdit.engine.loggers import Logger, MetricsFile, finite
from mmdit.engine.step import Step
from mmdit.engine.tasks import Probe, Task
from mmdit.errors import NotFinite
from mmdit.out_of_memory import enough_memory
from mmdit.plots import plot_losses, save_grid
from mmdit.printable import logger, printable
from mmdit.processes import Processes
from mmdit.runs.files import writing
from mmdit.runs.native import weights_hash

log = logger(__name__)
MAIN_FIGURES = (
    *("ema/loss", "raw/loss", "ema/psnr", "raw/psnr", "ema/accuracy", "raw/accuracy"),
    *("ema/accuracy_taught", "ema/accuracy_word", "ema/accuracy_old"),
    *("ema/accuracy_held_out", "ema/diversity"),
)
BINS = 4  # of the noise level, by which training losses are told apart


class Reports:
    """Writes what happens; every process measures, the main one writes.

    Args:
        path: of the run.
        task: what evaluates.
        logger: receives all figures and pictures, too.
        processes: of the run.
        start: number of steps already made; what was told of later ones is dropped.
        steps: of the whole run.
        every: steps between two rows of figures.
        probe: measures the averaged weights at every evaluation, too.
    """

    def __init__(
        self,
        path: Path,
        *,
        task: Task,
        logger: Logger,
        processes: Processes,
        start: int,
        steps: int,
        every: int = 1,
        probe: Probe | None = None,
    ) -> None:
        self.path, self.task, self.logger, self.processes = path, task, logger, processes
        self.steps, self.probe = steps, probe
        self._metrics = (
            MetricsFile(path / "metrics.jsonl", start_step=start, every=every)
            if processes.main
            else None
        )
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            desc=printable(path.name),
            disable=None if processes.main else True,
        )

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures after `step` steps."""
        if self._metrics is not None:
            self._metrics.log(step, figures)
            self.logger.log(step, figures)

    def step(
        self,
        step: int,
        made: Step,
        parts: Sequence[Part],
        said: Mapping[str, float],
        *,
        lr: float,
        skipped: int | None,
        rates: Mapping[str, float],
    ) -> None:
        """Log a row of the step just made: of it alone, as a mean would depend on where a run was
        stopped.

        Args:
            step: number of steps made.
            made: its outcome.
            parts: the examples of this process.
            said: what the task says of its losses, in this process.
            lr: its learning rate.
            skipped: number of steps of the whole run that were left out; None is not logged.
            rates: speed since the last row.
        """
        row = {"loss": made.loss, "gradient_norm": made.norm, "lr": lr}
        if skipped is not None:
            row["skipped_steps"] = skipped
        times = [self.task.times(part.example) for part in parts]
        row |= levels(times, made.losses, self.processes) | self._of_all(said) | dict(rates)
        self.figures(step, row)
        speed = f"{rates['images_per_second']:.0f} images/s"
        self._bar.set_postfix_str(f"loss {made.loss:.4f}, {speed}")

    def _of_all(self, said: Mapping[str, float]) -> dict[str, float]:
        """The means over processes."""
        everyone = self.processes.gather(dict(said))
        return {name: sum(f[name] for f in everyone) / len(everyone) for name in everyone[0]}

    def advance(self) -> None:
        """Show that one more step was made."""
        self._bar.update()

    def evaluate(
        self, step: int, averaged: nn.Module, raw: nn.Module, kept: Mapping[str, nn.Module]
    ) -> dict[str, float]:
        """Validation figures, EMA and raw, and images of what the average can do, if finite.

        Args:
            step: number of steps made.
            averaged, raw: what is measured.
            kept: what checkpoints hold of them, by 'ema' and 'raw'; its hash is recorded.

        Raises:
            UserError: the disk is full or the folder cannot be written to; memory runs out.
        """
        record: dict[str, Any] = {**self.task.protocol, "step": step}
        figures: dict[str, float] = {}
        memory = functools.partial(
            enough_memory,
            f"evaluating step {step}",
            "precision=bf16, or a smaller training.validation_size or data.image_size",
        )
        for kind, which in (("ema", averaged), ("raw", raw)):
            with memory():
                measured = self.task.evaluate(which)
                if self.probe is not None and which is averaged:
                    measured |= self._probed(step, averaged)
            record[kind] = {"weights_sha256": weights_hash(kept[kind]), **finite(measured)}
            figures |= {f"{kind}/{k}": v for k, v in measured.items()}
        try:
            with memory():
                images, captions = self.task.picture(averaged)
        except NotFinite as error:  # a model in training may get over it; the losses decide
            log.warning("step %d: no sample images: %s", step, error)
            images, captions = None, []
        if self._metrics is not None:
            name = f"step_{step:08d}"
            path = self.path / "evaluations" / f"{name}.json"
            with writing(path, self.path):
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, json.dumps(record, indent=1).encode())
            self.figures(step, figures)
            told = ", ".join(f"{k} {figures[k]:.4g}" for k in MAIN_FIGURES if k in figures)
            log.info("%s: step %d of %d, %s", self.path.name, step, self.steps, told)
            grid = self.path / "samples" / f"{name}.png"
            if images is not None:
                with writing(grid, self.path):
                    save_grid(images, captions, path=grid)
                self.logger.picture(step, "samples", grid)
            curves = self.path / "loss.png"
            with writing(curves, self.path):
                plot_losses(self._metrics.curves, curves)
            self.logger.picture(step, "curves", curves)
        return figures

    def _probed(self, step: int, averaged: nn.Module) -> dict[str, float]:
        """What the probe measures; nothing where the model cannot be sampled from."""
        assert self.probe is not None
        try:
            return self.probe(averaged)
        except NotFinite as error:
            log.warning("step %d: the probe measures nothing: %s", step, error)
            return {}

    def close(self) -> None:
        """Nothing is logged after this."""
        self._bar.close()
        if self._metrics is not None:
            self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def by_level(t: Tensor, losses: Tensor) -> dict[str, float]:
    """Mean loss in each of `BINS` intervals of t, (b,); none where no sample fell into it."""
    number = (t * BINS).long().clamp(0, BINS - 1)
    return {
        f"loss_t{i / BINS:.2f}-{(i + 1) / BINS:.2f}": losses[number == i].mean().item()
        for i in range(BINS)
        if bool((number == i).any())
    }


def levels(parts_t: list[Tensor | None], losses: Tensor, processes: Processes) -> dict[str, float]:
    """`by_level` of the whole batch of a step; nothing for tasks without noise levels."""
    found = [t for t in parts_t if t is not None]
    if not found:
        return {}
    everyone = processes.gather((torch.cat(found), losses))
    return by_level(torch.cat([t for t, _ in everyone]), torch.cat([loss for _, loss in everyone]))
