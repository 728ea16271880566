"""The training loop: one for the autoencoder and for the flow.

A run is a pure function of its config and seed. Order, timesteps, noise and drop-out are keyed by
(seed, step, sample), the learning rate by the step; so weights, averages, moments and the step are
all there is to save, and a resumed run equals an unbroken one bit for bit on the CPU.
"""

import json
import logging
import math
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from tqdm import tqdm

from mmdit.checkpoints.native import (
    load_strictly,
    load_tensors,
    weights_hash,
    write_atomically,
)
from mmdit.checkpoints.runs import Checkpoint
from mmdit.data.order import ShuffledOrder
from mmdit.engine.ema import EMA
from mmdit.engine.loggers import Logger, MetricsFile
from mmdit.engine.optimizers import load_moments, moments, rates_of, set_lr
from mmdit.engine.pictures import plot_losses, save_grid
from mmdit.engine.posthoc import PostHoc
from mmdit.engine.runs import RunFolder
from mmdit.engine.tasks import Task
from mmdit.errors import UserError

log = logging.getLogger(__name__)
MAIN_FIGURES = ("ema/loss", "raw/loss", "ema/psnr", "raw/psnr", "ema/accuracy", "raw/accuracy")


class Interrupted(Exception):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, checkpoint: Checkpoint, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {checkpoint.step}")
        self.checkpoint, self.number = checkpoint, number


class Signals:
    """Turns SIGINT and SIGTERM into a wish that the loop looks at after each step.

    A second signal of the same kind does what it did before: it ends the process at once.
    """

    def __enter__(self) -> Self:
        self.received: int | None = None
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Settings(NamedTuple):
    """How long to train, and how often to do what; see `configs/training`."""

    steps: int
    samples: int  # size of the training set; its order is drawn anew each epoch
    batch_size: int
    clip: float  # greatest norm of the gradient
    log_every: int
    evaluate_every: int
    save_every: int
    keep: int  # checkpoints

    @classmethod
    def of(cls, config: Mapping[Any, Any], where: str) -> Self:
        """The settings among the keys of a config section.

        Raises:
            UserError: a value is no positive number, or not whole where it counts something.
        """
        return cls(**{name: positive(config, name, where) for name in cls._fields})


def positive(config: Mapping[Any, Any], name: str, where: str) -> Any:
    """A value of a config section that counts something, or the real number `clip`.

    Raises:
        UserError: it is no number above 0, or not whole.
    """
    value = config[name]
    kind, expected = (float | int, "a") if name == "clip" else (int, "a whole")
    if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        raise UserError(f"{where}.{name}={value} must be {expected} number above 0")
    return value


def train(
    task: Task,
    *,
    run: RunFolder,
    settings: Settings,
    seed: int,
    schedule: Callable[[int], float],
    optimizer: torch.optim.Optimizer,
    ema: EMA[Any],
    logger: Logger,
    posthoc: PostHoc | None = None,
) -> Checkpoint:
    """Train `task` up to `settings.steps` steps, from the newest checkpoint of `run` if it has one.

    Args:
        seed: of the order of samples.
        schedule: factor of the optimizer's learning rate at each step.
        posthoc: averages kept beside `ema`, to make others of after training.

    Raises:
        Interrupted: SIGINT or SIGTERM; the step was finished and saved.
        UserError: the loss or the gradient is not finite. The last good checkpoint stays.
    """
    module = task.module
    rates = rates_of(optimizer)
    order = ShuffledOrder(size=settings.samples, seed=seed)
    start = restore(run, module, ema, optimizer, posthoc)
    metrics = MetricsFile(run.path / "metrics.jsonl", start_step=start)
    figures: dict[str, float] = {}

    def save(step: int) -> Checkpoint:
        return run.save(
            step=step,
            finished=step >= settings.steps,
            modules={"raw": module, "ema": ema.module},
            optimizer=moments(module, optimizer) | (posthoc.tensors() if posthoc else {}),
            keep=settings.keep,
            figures=figures,
        )

    def report(step: int, figures: Mapping[str, float]) -> None:
        metrics.log(step, figures)
        logger.log(step, figures)

    def look(step: int) -> None:
        """Validation figures, EMA and raw, and pictures of what the average can do."""
        record: dict[str, Any] = {**task.protocol, "step": step}
        for kind, which in (("ema", ema.module), ("raw", module)):
            measured = task.evaluate(which)
            record[kind] = {"weights_sha256": weights_hash(which), **measured}
            figures.update({f"{kind}/{k}": v for k, v in measured.items()})
        path = run.path / "evaluations" / f"step_{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1).encode())
        report(step, figures)
        told = ", ".join(f"{name} {figures[name]:.4g}" for name in MAIN_FIGURES if name in figures)
        log.info("%s: step %d of %d, %s", run.path.name, step, settings.steps, told)
        picture = save_grid(
            *task.picture(ema.module), path=run.path / "samples" / f"step_{step:08d}.png"
        )
        logger.picture(step, "samples", picture)
        logger.picture(step, "curves", plot_losses(metrics.rows, run.path / "loss.png"))

    checkpoint = run.latest()
    if checkpoint is not None:
        figures.update(checkpoint.figures)
    bar = tqdm(total=settings.steps, initial=start, unit="step", desc=run.path.name, disable=None)
    module.train()
    with Signals() as signals:
        seen, since = start, time.perf_counter()
        for step in range(start, settings.steps):
            indices = order(step * settings.batch_size, settings.batch_size)
            set_lr(optimizer, [rate * schedule(step) for rate in rates])
            loss, norm = make_step(task, optimizer, step, indices, settings.clip)
            done = step + 1
            ema.update(done)
            if posthoc is not None:
                posthoc.update(done, run.path, last=done == settings.steps)
            bar.update()

            if done % settings.log_every == 0:
                speed = (done - seen) * settings.batch_size / (time.perf_counter() - since)
                # Of this step alone: a mean would depend on where a run was stopped.
                report(done, {"loss": loss, "gradient_norm": norm, "images_per_second": speed})
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s")
            if done % settings.evaluate_every == 0 or done == settings.steps:
                look(done)
            if done % settings.save_every == 0 or done == settings.steps or signals.received:
                checkpoint = save(done)
            if done % settings.log_every == 0:
                seen, since = done, time.perf_counter()
            if signals.received and done < settings.steps:
                bar.close()
                metrics.close()
                assert checkpoint is not None
                raise Interrupted(checkpoint, signals.received)
    bar.close()
    metrics.close()
    assert checkpoint is not None
    return checkpoint


def make_step(
    task: Task, optimizer: torch.optim.Optimizer, step: int, indices: Sequence[int], clip: float
) -> tuple[float, float]:
    """Forward, backward, clip, update: the loss and the norm of the gradient before clipping."""
    optimizer.zero_grad(set_to_none=True)
    losses = task.loss(step, indices)
    loss = losses.mean()
    loss.backward()
    weights = [weight for weight in task.module.parameters() if weight.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(weights, clip).item()
    if not math.isfinite(norm) or not torch.isfinite(loss):
        bad = [
            i for i, value in zip(indices, losses.tolist(), strict=True) if not math.isfinite(value)
        ]
        raise UserError(
            f"step {step}: the loss is {loss.item()} and the gradient norm {norm}"
            + (f"; not finite for samples {bad[:10]}" if bad else "")
            + ". The weights were not updated: lower optimizer.lr, and go on from the last "
            "checkpoint with resume=auto"
        )
    optimizer.step()
    return loss.item(), norm


def restore(
    run: RunFolder,
    module: nn.Module,
    ema: EMA[Any],
    optimizer: torch.optim.Optimizer,
    posthoc: PostHoc | None = None,
) -> int:
    """Load the newest checkpoint of a run, if any; the number of steps already made."""
    checkpoint = run.latest()
    if checkpoint is None:
        return 0
    for name, target in (("raw", module), ("ema", ema.module)):
        path = checkpoint.verified(f"{name}.safetensors")
        load_strictly(target, load_tensors(path)[0], path)
    kept = run.load_optimizer(checkpoint)
    if posthoc is not None:
        posthoc.take(kept)
    load_moments(module, optimizer, kept)
    return checkpoint.step


def how_to_resume(run: Path, words: Sequence[str]) -> str:
    """The command line that goes on with a run started with `words`."""
    kept = [word for word in words if not word.startswith(("resume=", "run="))]
    return shlex.join(["python", "train.py", *kept, f"resume={run}"])
