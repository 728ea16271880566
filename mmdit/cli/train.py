"""Train a text-to-image model: `python train.py`, see `python train.py --help`."""

import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mmdit.checks import MOST_STEPS, expect, expect_number
from mmdit.cli.formulations import check_variant, store_formulations
from mmdit.cli.launch import Verbatim, launch, sweep_label
from mmdit.cli.stages import (
    check_recipe,
    check_until,
    clip_for_metrics,
    give_autoencoder,
    is_finished,
    sweep_folder,
    write_scores,
)
from mmdit.cli.values import seed_of, whole
from mmdit.data.dataset import Data
from mmdit.devices import available
from mmdit.engine.activations import recompute
from mmdit.engine.ema import EMA
from mmdit.engine.loader import share
from mmdit.engine.loggers import Logger, NoLogger
from mmdit.engine.loop import train
from mmdit.engine.schedules import Schedule
from mmdit.engine.settings import Settings, positive
from mmdit.engine.state import TrainState, take_frozen
from mmdit.engine.tasks import FlowTask, Validation
from mmdit.errors import UserError
from mmdit.latents.precompute import Unfinished
from mmdit.models.matching import matched
from mmdit.pipeline import Pipeline
from mmdit.precision import autocast, chosen_dtype, reason
from mmdit.printable import logger, show
from mmdit.processes import Processes, join, leave, own_device, restart_remarks
from mmdit.runs.checkpoint import Checkpoint
from mmdit.runs.folder import check_name, open_together
from mmdit.runs.signals import Interrupted
from mmdit.study.emphasis import report_formulation

log = logger("mmdit.train")


def job(config: DictConfig, _: Verbatim) -> None:
    """Compose, build, run. All is built before anything is trained: mistakes show at once."""
    began = time.perf_counter()
    for key in ("name", "runs", "run", "resume"):  # name=2024 is a name all the same
        config[key] = config[key] if config[key] is None else str(config[key])
    check_name(config.name)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    check_variant(config.variant, plain["objective"])
    device = own_device(available(config.device))
    precision = autocast(device, config.precision)
    dtype = chosen_dtype(device, config.precision)
    plain["computed"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    settings = Settings.of(config.training, "training")
    seed_of(config)
    whole(config, "image_size")
    whole(config, "sampling.steps", most=MOST_STEPS)
    expect_number("sampling.guidance", config.sampling.guidance)
    expect(isinstance(config.compile, bool), "compile", config.compile, "must be true or false")
    trained = config.autoencoder.trained
    expect(isinstance(trained, bool), "autoencoder.trained", trained, "must be true or false")
    if trained:
        check_recipe(config, "autoencoder")
    if config.get("metrics") is not None:
        check_recipe(config, "clip")
    validation_size = positive(config.training, "validation_size", "training")
    processes = join(device, settings.timeout)
    share(settings.batch_size, processes, settings.accumulation)
    if config.get("metrics") is not None and processes.world_size > 1:
        raise UserError(
            "metrics: scores are measured by one process; start train.py without torchrun"
        )
    if not processes.main:
        logging.getLogger("mmdit").setLevel(logging.WARNING)
    for remark in restart_remarks(sys.argv[1:]) if processes.main else ():
        log.warning("note: %s", remark)
    data: Data = processes.once(lambda: instantiate(config.data))
    validating = data.view("validation")
    if config.get("metrics") is not None and data.name != "shapes":
        raise UserError("metrics: its CLIP and its prompts are those of data=shapes; leave it out")
    if found := data.fingerprint():  # a run and its stages belong to these pictures
        plain["data"]["found"] = found
    pipeline = build_pipeline(config).to(device)
    ema = EMA(pipeline, profile=instantiate(config.ema))
    parallel = instantiate(config.parallel)
    recompute(pipeline, config.activation_checkpointing)
    if config.compile:
        pipeline.mmdit.compile()
    parallel.place(pipeline, ema.module, device=device, dtype=dtype)
    optimizer = instantiate(config.optimizer)(pipeline)
    posthoc = instantiate(config.posthoc)(pipeline) if config.get("posthoc") else None
    schedule = instantiate(config.schedule)
    remarks = schedule.check_length(settings.steps) if isinstance(schedule, Schedule) else []
    if ema.profile.every > settings.steps:
        remarks.append(
            f"ema.every={ema.profile.every} is more than training.steps={settings.steps}: the "
            "average, which is sampled from and measured, stays at the random start"
        )
    if config.get("metrics") is not None:
        instantiate(config.metrics)  # long before it is used
        with torch.device("meta"):
            instantiate(config.clip.model)
    source = instantiate(config.latents)(
        data=data,
        autoencoder=pipeline.autoencoder,
        text=pipeline.text,
        autocast=precision,
    )
    logger: Logger = instantiate(config.logger) if processes.main else NoLogger()
    text_device = None if config.text_device is None else available(config.text_device)
    if text_device is not None and not pipeline.text.frozen:
        raise UserError(
            f"text_device={config.text_device} is for encoders that are not trained, as those of "
            "text=published; leave it out"
        )

    def prepare(run: Path | None) -> None:
        if run is None or not take_frozen(run, pipeline, ema):
            with processes.main_first():
                give_autoencoder(pipeline.autoencoder, config, plain, data, device, precision)
        if config.until != "autoencoder":
            source.prepare(processes)
        if text_device is not None:
            for module in (pipeline, ema.module):
                module.text.to(text_device)

    if config.until is not None:
        check_until(config.until, source)
        with closing(processes, logger, "the same command"):
            prepare(None)
        return
    label = sweep_label()
    run = open_together(
        processes,
        Path(config.runs),
        name=config.name,
        run=config.run or (label and str(sweep_folder(config, label))),
        resume=config.resume or (label and "finish"),
        config=plain,
    )
    if (config.resume or label) and is_finished(config, run):
        log.info("%s is finished: it has made training.steps=%d", run.path, settings.steps)
        leave()
        return
    log.info("computing in %s", reason(device, config.precision))
    again = how_to_resume(None if label else run.path, sys.argv[1:])
    run.keep_command(again)
    with closing(processes, logger, again):
        for remark in remarks if processes.main else ():
            log.warning("note: %s", remark)
        logger.start(run.path, plain)  # what it needs from elsewhere must be there now
        prepare(run.path)
        # A group that is left out has no key.
        measured = config.get("metrics") is not None
        measure = clip_for_metrics(config, plain, device, precision) if measured else None
        validation = validation_of(validating, validation_size)
        if processes.main:
            report_formulation(pipeline.objective, run.path)
            for remark in pipeline.text.remarks_on_captions(validation.captions):
                log.warning("%s", remark)
        task = FlowTask(
            module=pipeline,
            source=source,
            validation=validation,
            seed=config.seed,
            autocast=precision,
        )
        checkpoint = train(
            task,
            TrainState(pipeline, ema=ema, optimizer=optimizer, schedule=schedule, posthoc=posthoc),
            run=run,
            settings=settings,
            seed=config.seed,
            logger=logger,
            processes=processes,
            parallel=parallel,
            config=plain,
        )
        if measure is not None:
            pipelines = {"ema": ema.module, "raw": pipeline}
            variant = config.variant or label or config.name
            write_scores(config, run.path, checkpoint, pipelines, *measure, variant, precision)
    if processes.main:
        prompt = next(iter(task.validation.prompts))
        tell_results(run.path, checkpoint, (time.perf_counter() - began) / 60)
        opened = f"checkpoint={shlex.quote(str(run.path))}"
        if config.imports:
            opened += " " + shlex.quote(f"imports=[{','.join(config.imports)}]")
        log.info("sample from it: python sample.py %s prompt=%s", opened, shlex.quote(prompt))
        if data.name == "shapes":
            log.info("measure it:     python eval/compositional.py %s", opened)


@contextmanager
def closing(processes: Processes, logger: Logger, again: str) -> Iterator[None]:
    """Close all at the end of the block, and after a signal tell how to go on: by `again`."""
    try:
        yield
    except (Interrupted, Unfinished) as stop:
        if processes.main:
            show("", f"stopped by {stop}", f"to go on: {again}", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        logger.close()
        leave()


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


def describe(config: DictConfig) -> Iterator[str]:
    """How large the model is; built on the meta device, where weights take no memory."""
    with torch.device("meta"):
        paper, pipeline = instantiate(config.model), build_pipeline(config)
    yield f"{count(paper):,} parameters in the MMDiT, with the paper's text encoders"
    yield f"{count(pipeline.mmdit):,} in the MMDiT, with the text encoders of this config"
    yield f"{count(pipeline.text):,} in the text encoders"
    yield f"{count(pipeline.autoencoder):,} in the autoencoder"


def count(module: torch.nn.Module) -> int:
    """Number of parameters; the position table is no parameter."""
    return sum(weight.numel() for weight in module.parameters())


def build_pipeline(config: DictConfig) -> Pipeline:
    """The untrained model; its weights follow from the seed."""
    torch.manual_seed(config.seed)
    autoencoder = instantiate(config.autoencoder.model)
    text = instantiate(config.text)
    fitting: dict[str, Any] = {
        "latent_channels": autoencoder.latent_channels,
        "context_width": text.context_width,
        "pooled_width": text.pooled_width,
    }
    if config.match:
        with torch.device("meta"):
            asked, reference = (
                instantiate(model, **fitting) for model in (config.model, config.reference)
            )
        side = config.image_size // autoencoder.factor
        size = {"height": side, "width": side, "text_length": text.context_length}
        found = matched(asked, reference, by=config.match, **size)
        log.info("match=%s: width %d, mlp_ratio %g: %d of %d", config.match, *found)
        fitting |= {"width": found.width, "mlp_ratio": found.mlp_ratio}
    pipeline = Pipeline(
        mmdit=instantiate(config.model, **fitting),
        text=text,
        autoencoder=autoencoder.requires_grad_(False),
        objective=instantiate(config.objective),
        image_size=config.image_size,
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
    )
    pipeline.latent_size(config.image_size, config.image_size)
    return pipeline


def validation_of(data: Data, count: int) -> Validation:
    """The first `count` pictures of the validation split, and what to paint to look at."""
    images, captions, _ = data.square(range(min(count, len(data))))
    return Validation(images, captions, data.prompts() or captions[:16])


def tell_results(run: Path, checkpoint: Checkpoint, minutes: float) -> None:
    """What came out, and where it is."""
    figures = checkpoint.figures
    log.info("finished %s in %.1f minutes", run, minutes)
    log.info("  validation  %.4f EMA, %.4f raw", figures["ema/loss"], figures["raw/loss"])
    if skipped := figures.get("skipped_steps"):
        log.warning("  left out    %d of %d steps, not finite", skipped, checkpoint.step)
    samples = run / "samples" / f"{checkpoint.folder.name}.png"
    log.info("  samples     %s", samples if samples.is_file() else "none: they were not finite")
    log.info("  curves      %s", run / "loss.png")
    log.info("  metrics     %s", run / "metrics.jsonl")
    log.info("  checkpoint  %s", checkpoint.folder)


def main() -> None:
    """Train a text-to-image model, as the command line asks."""
    store_formulations()
    launch(job, config_name="train", describe=describe, outlives_output=True)
