"""The training loop: one for the autoencoder and for the flow.

A run is a pure function of its config and seed. Order, timesteps, noise and drop-out are keyed by
(seed, step, sample), the learning rate by the step; so weights, averages, moments and the step are
all there is to save, and a resumed run equals an unbroken one bit for bit on the CPU.
"""

import os
import re
import shlex
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdit.engine.advice import where_not_finite
from mmdit.engine.ema import EMA
from mmdit.engine.loader import Loader
from mmdit.engine.loggers import Logger
from mmdit.engine.meter import Meter
from mmdit.engine.optimizers import load_moments, moments, rates_of, room_for, set_lr
from mmdit.engine.parallel import Parallel, Single
from mmdit.engine.posthoc import PostHoc, remove_snapshots
from mmdit.engine.reports import Reports, levels
from mmdit.engine.step import Stepper
from mmdit.engine.tasks import Task
from mmdit.errors import UserError
from mmdit.printable import logger, printable
from mmdit.processes import Processes
from mmdit.registry import describe
from mmdit.runs import tensors as tensor_files
from mmdit.runs.checkpoint import FROZEN, Checkpoint, checkpoints_in
from mmdit.runs.folder import RunFolder
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver
from mmdit.runs.signals import Interrupted, Signals, time_limit

log = logger(__name__)
REAL = ("clip", "timeout")  # settings that need not be whole
MOST_SKIPPED = 100  # steps in a row, after which nothing will be finite any more
SHARE_SKIPPED = 0.1  # of the last `WINDOW` steps, or of all at the end: above, the run is ruined
WINDOW = 100


class Settings(NamedTuple):
    """How long to train, and how often to do what; see `configs/training`."""

    steps: int
    batch_size: int  # samples of a step, over all processes
    clip: float  # greatest norm of the gradient
    log_every: int
    evaluate_every: int
    save_every: int
    keep: int  # newest checkpoints
    keep_every: int | None = None  # steps of which this is a divisor keep theirs for good
    keep_best: str | None = None  # figure of the evaluation, whose best keeps its checkpoint
    asynchronous: bool = False  # write checkpoints while training goes on
    accumulation: int = 1  # parts that each process makes its share of a batch in
    workers: int = 0  # processes that prepare data for each process that trains
    timeout: float = 1800.0  # seconds after which a step is taken to hang
    nonfinite: str = "stop"  # or skip: what to do where a loss or a gradient is not finite
    section: str = "training"  # of the config, whose keys messages name

    @classmethod
    def of(cls, config: Mapping[Any, Any], where: str) -> Self:
        """The settings among the keys of a config section.

        Raises:
            UserError: a key is missing; a value is no positive number, not whole where it counts
                something, or no such word.
        """
        given = {name: config[name] for name in cls._fields if name in config}
        given["section"] = where
        if missing := [n for n in cls._fields if n not in given and n not in cls._field_defaults]:
            raise UserError(f"{where} has no {', '.join(missing)}, and needs them")
        others = {"workers", "nonfinite", "keep_best", "asynchronous", "section"}
        for name in given.keys() - others:
            if name != "keep_every" or given[name] is not None:
                positive(config, name, where)
        workers, nonfinite = given.get("workers", 0), given.get("nonfinite", "stop")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise UserError(f"{where}.workers={workers} must be a whole number, 0 or more")
        if nonfinite not in ("stop", "skip"):
            raise UserError(f"{where}.nonfinite={nonfinite} must be stop or skip")
        if not isinstance(best := given.get("keep_best"), str | None):
            raise UserError(f"{where}.keep_best={best} must be the name of a figure, as ema/loss")
        if not isinstance(given.get("asynchronous", False), bool):
            raise UserError(f"{where}.asynchronous={given['asynchronous']} must be true or false")
        return cls(**given)

    def retention(self, higher_is_better: Collection[str]) -> Retention:
        """Which checkpoints stay.

        Args:
            higher_is_better: figures, without the prefix that tells whose weights were measured.
        """
        figure = (self.keep_best or "").rpartition("/")[2]
        return Retention(
            last=self.keep,
            every=self.keep_every,
            best=self.keep_best,
            highest=figure in higher_is_better,
        )


def positive(config: Mapping[Any, Any], name: str, where: str) -> Any:
    """A value of a config section that counts something, or a real number of `REAL`.

    Raises:
        UserError: it is no number above 0, or not whole.
    """
    value = config[name]
    kind, expected = (float | int, "a") if name in REAL else (int, "a whole")
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < inf:
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
    processes: Processes | None = None,
    parallel: Parallel | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Train `task` up to `settings.steps` steps, from the newest checkpoint of `run` if it has one.

    Args:
        seed: of the order of samples.
        schedule: factor of the optimizer's learning rate at each step.
        posthoc: averages kept beside `ema`, to make others of after training.
        processes: that train together; None is this one alone.
        parallel: how; the task's module and its average have been placed.
        config: plain config, which checkpoints keep.

    Raises:
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP; the step was finished and saved.
        UserError: the loss or the gradient is not finite. The last good checkpoint stays.
    """
    module, device = task.module, next(task.module.parameters()).device
    processes = processes or Processes()
    parallel = parallel or Single()
    rates = rates_of(optimizer)
    saver = Saver(
        run.path,
        processes,
        keep=settings.retention(task.higher_is_better),
        config=config or {},
        asynchronous=settings.asynchronous,
    )
    found = restore(saver, module, ema, optimizer, posthoc)
    start, figures = (found.step, dict(found.figures)) if found else (0, {})
    if found and processes.main:
        log.info("going on with %s at step %d", run.path, start)
    if processes.main:
        remove_snapshots(run.path, start)
    reports = Reports(
        run.path,
        task=task,
        logger=logger,
        processes=processes,
        start=start,
        steps=settings.steps,
        every=settings.log_every,
    )
    loader = Loader(
        task.example,
        task.order(batch_size=settings.batch_size, seed=seed),
        batch_size=settings.batch_size,
        processes=processes,
        accumulation=settings.accumulation,
        workers=settings.workers,
        pin=device.type == "cuda",
        section=settings.section,
    )
    make_step = Stepper(
        module,
        parallel.losses(module, task.loss),
        parallel=parallel,
        processes=processes,
        optimizer=optimizer,
        clip=settings.clip,
        skips=settings.nonfinite == "skip",
        section=settings.section,
    )

    modules = {"raw": module, "ema": ema.module}

    def evaluate(step: int) -> None:
        figures.update(reports.evaluate(step, ema.module, module))
        bad = [name for name in figures if name.endswith("/loss") and not isfinite(figures[name])]
        bad += [name for name, value in figures.items() if isnan(value) and name not in bad]
        if step >= settings.steps and bad:
            raise UserError(
                f"step {step}: {', '.join(f'{name} {figures[name]}' for name in bad[:3])}: the "
                f"weights are ruined. {where_not_finite(settings.section)}"
            )
        if settings.keep_best is not None and settings.keep_best not in figures:
            log.warning(
                "%s.keep_best=%s is no figure of the evaluation, so none is the best: %s",
                *(settings.section, settings.keep_best, ", ".join(sorted(figures))),
            )

    def save(step: int) -> None:
        tensors = weights_of(module, ema)
        tensors["optimizer"] = moments(module, optimizer) | (posthoc.tensors() if posthoc else {})
        saver.save(
            step=step,
            finished=step >= settings.steps,
            tensors=tensors,
            descriptions={name: describe(part) for name, part in modules.items()},
            figures=figures,
        )

    skipped = 0  # steps in a row
    recent = deque[bool](maxlen=WINDOW)  # whether the last steps were left out
    module.train()
    meter = Meter(loader, device, processes.world_size)
    bar = tqdm(
        total=settings.steps,
        initial=start,
        unit="step",
        desc=printable(run.path.name),
        disable=None if processes.main else True,
    )
    with Signals() as signals, run.marked(start) as facts, saver, bar:
        steps = loader(start, settings.steps)
        for done in range(start + 1, settings.steps + 1):
            set_lr(optimizer, [rate * schedule(done - 1) for rate in rates])
            with time_limit(settings.timeout):
                parts = next(steps)
                made = make_step(parts, signals.flags())
            skipped = 0 if made.updated else skipped + 1
            if skipped:
                facts["skipped_steps"] = figures["skipped_steps"] = (
                    int(figures.get("skipped_steps", 0)) + 1
                )
                log.warning("step %d: loss or gradient not finite, step left out", done - 1)
            if skipped == MOST_SKIPPED:
                raise UserError(
                    f"step {done - 1}: {skipped} steps in a row were left out, because loss or "
                    f"gradient was not finite. {where_not_finite(settings.section)}"
                )
            recent.append(not made.updated)
            total = int(figures.get("skipped_steps", 0))
            if len(recent) == WINDOW and sum(recent) > SHARE_SKIPPED * WINDOW:
                raise _ruined(f"{sum(recent)} of the last {WINDOW}", done, settings.section)
            if done == settings.steps and (total > max(1, SHARE_SKIPPED * done) or total == done):
                raise _ruined(f"{total} of all {done}", done, settings.section)
            ema.update(done)
            if posthoc is not None:
                last = done == settings.steps
                posthoc.update(done, run.path, last=last, writes=processes.main)
            meter.count(settings.batch_size, task.work(parts[0].example))
            bar.update()

            received = signals.agreed(made.flags)
            if done % settings.log_every == 0:
                # Of this step alone: a mean would depend on where a run was stopped.
                told = {"loss": made.loss, "gradient_norm": made.norm}
                told |= {"lr": rates[0] * schedule(done - 1)}
                if settings.nonfinite == "skip":
                    told["skipped_steps"] = figures.get("skipped_steps", 0)  # of the whole run
                told |= levels([task.times(p.example) for p in parts], made.losses, processes)
                told |= meter.figures()
                reports.figures(done, told)
                meter.restart()
                speed = f"{told['images_per_second']:.0f} images/s"
                bar.set_postfix_str(f"loss {made.loss:.4f}, {speed}")
            evaluates = done % settings.evaluate_every == 0 or done == settings.steps
            best = evaluates and settings.keep_best is not None  # of the weights that were measured
            saves = done % settings.save_every == 0 or done == settings.steps or received or best
            with meter.paused():
                if evaluates:
                    evaluate(done)
                if saves:
                    save(done)
            if received and done < settings.steps:
                checkpoint = saver.wait()
                reports.close()
                raise Interrupted(checkpoint, received)
        if found and start >= settings.steps and not found.finished:  # fewer steps than before
            evaluate(start)
            save(start)
        checkpoint = saver.wait()
    reports.close()
    return checkpoint


def _ruined(count: str, done: int, section: str) -> UserError:
    return UserError(
        f"step {done - 1}: {count} steps were left out, because loss or gradient was not finite: "
        f"more than {SHARE_SKIPPED:.0%} train another model than was asked for. "
        f"{where_not_finite(section)}"
    )


def restore(
    saver: Saver,
    module: nn.Module,
    ema: EMA[Any],
    optimizer: torch.optim.Optimizer,
    posthoc: PostHoc | None = None,
) -> Checkpoint | None:
    """Load the newest checkpoint of a run that is whole, if there is any."""
    checkpoint = saver.latest()
    if checkpoint is None:
        return None
    kept = room_for(module, saver.facts(checkpoint, "optimizer"))
    saver.load(checkpoint, {**weights_of(module, ema), "optimizer": kept})
    if posthoc is not None:
        posthoc.take(kept)
    load_moments(module, optimizer, kept)
    return checkpoint


def weights_of(module: nn.Module, ema: EMA[Any]) -> dict[str, dict[str, Tensor]]:
    """All weights by their groups in a checkpoint: raw, averaged, and what both share."""
    raw, averaged = module.state_dict(), ema.module.state_dict()
    frozen = {key: raw.pop(key) for key in list(raw) if key in ema.shared}
    return {
        "raw": raw,
        "ema": {key: averaged[key] for key in raw},
        **({FROZEN: frozen} if frozen else {}),
    }


def take_frozen(run: Path, module: nn.Module, ema: EMA[Any]) -> bool:
    """Load what nobody trains from a run's newest checkpoint; whether there was one.

    A run goes on with the very autoencoder and encoders that it began with, even where they would
    by now come out differently.
    """
    for checkpoint in reversed(checkpoints_in(run, warn=False)):
        folder = checkpoint.folder / FROZEN
        if folder.is_dir() and checkpoint.fault(FROZEN) is None:
            tensor_files.read_into(folder, weights_of(module, ema).get(FROZEN, {}))
            return True
    return False


def how_to_resume(run: Path | None, words: Sequence[str]) -> str:
    """The command line that goes on with a run started with `words`.

    Args:
        run: None in a sweep, whose every job finds its own.
    """
    kept = list(words)
    if run is not None:
        kept = [word for word in words if not word.startswith(("resume=", "run="))]
        plain = re.fullmatch(r"[\w./-]+", str(run))  # to Hydra
        kept.append(f"resume={run}" if plain else f'resume="{run}"')
    count = os.environ.get("LOCAL_WORLD_SIZE")  # of processes that torchrun started here
    program = ["torchrun", f"--nproc_per_node={count}"] if count else ["python"]
    return shlex.join([*program, "train.py", *kept])
