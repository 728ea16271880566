"""The training loop: one for the autoencoder and for the flow.

A run is a pure function of its config and seed. Order, timesteps, noise and drop-out are keyed by
(seed, step, sample), the learning rate by the step; so weights, averages, moments and the step are
all there is to save, and a resumed run equals an unbroken one bit for bit on the CPU.
"""

from collections.abc import Mapping
from math import isfinite, isnan
from typing import Any

from mmdit.engine.advice import where_not_finite
from mmdit.engine.loader import Loader
from mmdit.engine.loggers import Logger
from mmdit.engine.meter import Meter
from mmdit.engine.parallel import Parallel, Single
from mmdit.engine.posthoc import remove_snapshots
from mmdit.engine.reports import Reports
from mmdit.engine.rounds import Collector, begins, collect
from mmdit.engine.settings import Settings
from mmdit.engine.skips import Skips
from mmdit.engine.state import TrainState
from mmdit.engine.step import Stepper
from mmdit.engine.tasks import Probe, Task
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.runs.checkpoint import Checkpoint
from mmdit.runs.folder import RunFolder
from mmdit.runs.saving import Saver
from mmdit.runs.signals import Interrupted, Signals, time_limit

log = logger(__name__)


def train(
    task: Task,
    state: TrainState,
    *,
    run: RunFolder,
    settings: Settings,
    seed: int,
    logger: Logger,
    processes: Processes | None = None,
    parallel: Parallel | None = None,
    config: Mapping[str, Any] | None = None,
    probe: Probe | None = None,
    collector: Collector | None = None,
) -> Checkpoint:
    """Train `task` up to `settings.steps` steps, from the newest checkpoint of `run` if it has one.

    Args:
        state: of the task's module; what `run` has kept is loaded into it.
        seed: of the order of samples.
        processes: that train together; None is this one alone.
        parallel: how; the module and its average have been placed.
        config: plain config, which checkpoints keep.
        probe: measures the averaged weights at every evaluation, too.
        collector: makes the data of every round of steps; None trains on what `task` reads.

    Raises:
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP; the step, or the round, was finished and
            saved.
        UserError: the loss or the gradient is not finite. The last good checkpoint stays.
    """
    processes, parallel = processes or Processes(), parallel or Single()

    # Resume: weights, averages, moments, the step, and what the checkpoint says of the run.
    saver = make_saver(task, settings, run, processes, config or {}, probe)
    found = state.load(saver)
    figures = dict(found.metrics) if found else {}  # of the last evaluation
    skips = Skips(int(figures.pop("skipped_steps", 0)), section=settings.section)
    if processes.main:
        if found:
            log.info("going on with %s at step %d", run.path, state.step)
        remove_snapshots(run.path, state.step)

    # Prepare: what reads the data, makes a step, and reports.
    loader = make_loader(task, settings, state, processes, seed)
    step = make_stepper(task, settings, state, processes, parallel)
    meter = Meter(loader, state.device, processes.world_size)
    reports = make_reports(task, settings, state, run, processes, logger, probe)
    with Signals() as signals, run.marked(state.step) as facts, saver, reports:
        steps = loader(state.step, settings.steps)
        while state.step < settings.steps:
            # Collect what the steps of a round train on.
            if collector is not None and begins(collector, state.step):
                reports.figures(state.step + 1, collect(collector, state))

            # Train one step.
            last = state.step + 1 == settings.steps
            lr = state.set_rate()
            with time_limit(settings.timeout):
                parts = next(steps)
                made, said = step(parts, signals.flags()), task.figures()
            skips.count(state.step, skipped=not made.updated)
            facts.update(skips.figures())
            skips.check(state.step, last=last)
            state.advance(run.path, last=last, writes=processes.main)

            # Log it.
            meter.count(settings.batch_size, task.work(parts[0].example))
            if state.step % settings.log_every == 0:
                skipped = skips.total if settings.nonfinite == "skip" else None
                rates = meter.figures()
                reports.step(state.step, made, parts, said, lr=lr, skipped=skipped, rates=rates)
                meter.restart()
            reports.advance()

            # Evaluate and save.
            received = signals.agreed(made.flags) if begins(collector, state.step) else None
            with meter.paused():
                if settings.evaluates(state.step):
                    figures = evaluate(state, reports, settings)
                if settings.saves(state.step) or received:
                    state.save(saver, finished=last, figures={**figures, **skips.figures()})
            if received and not last:
                raise Interrupted(saver.wait(), received)

        if found and state.step == found.step and not found.finished:
            # It was stopped beyond the steps that are now asked for: measure what it has.
            figures = evaluate(state, reports, settings)
            state.save(saver, finished=True, figures={**figures, **skips.figures()})
        return saver.wait()


def make_saver(
    task: Task,
    settings: Settings,
    run: RunFolder,
    processes: Processes,
    config: Mapping[str, Any],
    probe: Probe | None,
) -> Saver:
    """What writes and finds checkpoints."""
    higher = task.higher_is_better | (probe.higher_is_better if probe else set())
    return Saver(
        run.path,
        processes,
        keep=settings.retention(higher),
        config=config,
        asynchronous=settings.asynchronous,
    )


def make_loader(
    task: Task, settings: Settings, state: TrainState, processes: Processes, seed: int
) -> Loader:
    """What reads this process's share of each batch."""
    return Loader(
        task.example,
        task.order(batch_size=settings.batch_size, seed=seed),
        batch_size=settings.batch_size,
        processes=processes,
        accumulation=settings.accumulation,
        workers=settings.workers,
        pin=state.device.type == "cuda",
        section=settings.section,
    )


def make_stepper(
    task: Task, settings: Settings, state: TrainState, processes: Processes, parallel: Parallel
) -> Stepper:
    """What makes a step of the optimizer, on a module in training mode."""
    state.module.train()
    return Stepper(
        parallel.losses(state.whole, task.loss),
        parallel=parallel,
        processes=processes,
        trained=state.trained,
        clip=settings.clip,
        skips=settings.nonfinite == "skip",
        section=settings.section,
    )


def make_reports(
    task: Task,
    settings: Settings,
    state: TrainState,
    run: RunFolder,
    processes: Processes,
    logger: Logger,
    probe: Probe | None,
) -> Reports:
    """What logs and evaluates."""
    return Reports(
        run.path,
        task=task,
        logger=logger,
        processes=processes,
        start=state.step,
        steps=settings.steps,
        every=settings.log_every,
        probe=probe,
    )


def evaluate(state: TrainState, reports: Reports, settings: Settings) -> dict[str, float]:
    """Validation metrics of the averaged and the raw weights.

    Raises:
        UserError: training is at its end, and some of them are not finite.
    """
    figures = reports.evaluate(state.step, state.ema.module, state.module, state.kept())
    bad = [name for name in figures if name.endswith("/loss") and not isfinite(figures[name])]
    bad += [name for name, value in figures.items() if isnan(value) and name not in bad]
    if bad and state.step >= settings.steps:
        raise UserError(
            f"step {state.step}: {', '.join(f'{name} {figures[name]}' for name in bad[:3])}: the "
            f"weights are ruined. {where_not_finite(settings.section)}"
        )
    if settings.keep_best is not None and settings.keep_best not in figures:
        log.warning(
            "%s.keep_best=%s is not a validation metric, so no checkpoint is the best; available: "
            "%s",
            *(settings.section, settings.keep_best, ", ".join(sorted(figures))),
        )
    return figures
