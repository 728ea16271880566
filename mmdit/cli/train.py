"""Train a text-to-image model: `python train.py`, see `python train.py --help`."""

import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from mmdit.cli.alignment import PostTraining, post_training
from mmdit.cli.build import Parts, build, describe
from mmdit.cli.commands import how_to_resume
from mmdit.cli.few_steps import source_for_student, student_task
from mmdit.cli.formulations import store_formulations
from mmdit.cli.launch import Verbatim, launch, sweep_label
from mmdit.cli.prior import own_prediction, with_class_images
from mmdit.cli.reading import VERBATIM, TrainingRequest, read
from mmdit.cli.scores import is_finished, write_scores
from mmdit.cli.stages import check_until, clip_for_metrics, load_trained_autoencoder
from mmdit.cli.then import check_then, next_words, replace_process
from mmdit.data.dataset import Data
from mmdit.data.shapes import Shapes
from mmdit.engine.loop import train
from mmdit.engine.schedules import Schedule
from mmdit.engine.state import take_frozen
from mmdit.engine.tasks import FlowTask, Probe, Task
from mmdit.engine.validation import Validation
from mmdit.errors import UserError
from mmdit.latents.precompute import Unfinished
from mmdit.latents.sources import LatentSource
from mmdit.pipeline import Pipeline
from mmdit.precision import reason
from mmdit.printable import logger, show
from mmdit.processes import leave
from mmdit.programs import command
from mmdit.recipes import config_hash
from mmdit.runs.checkpoint import Checkpoint
from mmdit.runs.folder import RunFolder, open_together
from mmdit.runs.signals import Interrupted
from mmdit.study.emphasis import report_formulation
from mmdit.text.clip_pair import CLIPPair
from mmdit.text.waiting import remember, waiting

log = logger("mmdit.train")


def job(config: DictConfig, text: Verbatim) -> list[str]:
    """Read, build, prepare, fit, score. All is built before anything is trained: mistakes show at
    once.

    Returns:
        The arguments of what is trained next, from the result; none if there is nothing.
    """
    began = time.perf_counter()
    request = read(config, text)
    check_then(request)
    request = with_class_images(request)
    parts = build(config, request.device, request.dtype, request.initial)
    source = open_latents(request, parts)
    aligned = post_training(request, parts)
    run = open_run(request) if config.until is None else None
    if run is not None and (config.resume or sweep_label()) and is_finished(config, run):
        log.info("%s is finished: it has made training.steps=%d", run.path, config.training.steps)
        leave()
        return next_words(request, run.path)
    with closing(request, run):
        prepare(request, parts, source, run)
        if run is None:
            return []
        measure = prepare_scores(request)
        validation = validation_of(request.validation, config.training.validation_size)
        encode_prompts(request, parts, validation)
        checkpoint = fit(request, parts, source, run, validation, aligned)
        score(request, parts, run, checkpoint, measure)
    if request.processes.main:
        prompt = next(iter(validation.prompts))
        report(request, run.path, checkpoint, prompt, (time.perf_counter() - began) / 60)
    return next_words(request, run.path)


def open_latents(request: TrainingRequest, parts: Parts) -> LatentSource:
    """Where the latents of the data come from, with a look at whether all parts fit together.

    Raises:
        UserError: they do not.
    """
    config, pipeline, state = request.config, parts.pipeline, parts.state
    source: LatentSource = instantiate(config.latents)(
        data=request.data,
        autoencoder=pipeline.autoencoder,
        text=pipeline.text,
        autocast=request.precision,
    )
    if request.text_device is not None and not pipeline.text.frozen:
        raise UserError(
            f"text_device={config.text_device} is for encoders that are not trained, as those of "
            "text=published; leave it out"
        )
    source = source_for_student(request, parts, source)
    own_prediction(config, pipeline)  # long before it is used
    check_sizes(request.data, pipeline)
    if config.until is not None:
        check_until(config.until, source)
        return source
    schedule, steps, every = state.schedule, request.settings.steps, state.ema.profile.every
    remarks = schedule.check_length(steps) if isinstance(schedule, Schedule) else []
    start = "random start" if request.initial is None else "initial weights"
    if every > steps:
        remarks.append(
            f"ema.every={every} is more than training.steps={steps}: the average, which is "
            f"sampled from and measured, stays at the {start}"
        )
    for remark in remarks if request.processes.main else ():
        log.warning("note: %s", remark)
    return source


def check_sizes(data: Data, pipeline: Pipeline) -> None:
    """Check that the network can compute all sizes that images are cropped to.

    Raises:
        UserError: it cannot.
    """
    size_of = getattr(data, "size_of", None)  # of data sets that can be cached
    sizes = {size_of(index) for index in range(len(data))} if size_of else set()
    for height, width in sorted(sizes):
        try:
            pipeline.latent_size(height, width)
        except UserError as error:
            raise UserError(
                f"images are cropped to {width} x {height}: {error}. Choose a smaller image_size; "
                "data.max_ratio=1 crops all images to squares"
            ) from None


def open_run(request: TrainingRequest) -> RunFolder:
    """The folder of this run, which is now held: a new one, or the one to go on with."""
    config, label = request.config, sweep_label()
    return open_together(
        request.processes,
        Path(config.runs),
        name=config.name,
        run=config.run or (label and str(sweep_folder(config, label))),
        resume=config.resume or (label and "finish"),
        config=request.plain,
    )


def sweep_folder(config: DictConfig, label: str) -> Path:
    """The run folder of a job of a multirun, named by what is varied, so that it is found again."""
    name = re.sub(r"[^\w.,=+-]", "_", f"{label},seed={config.seed}")
    if len(name) > 150:  # file systems allow 255 bytes
        name = f"{name[:130]}-{config_hash(name)}"
    return Path(config.runs) / config.name / name


def prepare(
    request: TrainingRequest, parts: Parts, source: LatentSource, run: RunFolder | None
) -> None:
    """Get what is not trained by this run: the trained autoencoder, and the latents.

    Args:
        run: to train; None stops after this.
    """
    config, processes, state = request.config, request.processes, parts.state
    if run is not None:
        log.info("computing in %s", reason(request.device, config.precision))
        run.keep_command(how_to_resume(None if sweep_label() else run.path, request.words))
        request.logger.start(run.path, request.plain)  # what it needs from elsewhere must be there
    if run is None or not take_frozen(run.path, state.module, state.ema):
        with processes.main_first():
            load_trained_autoencoder(
                parts.pipeline.autoencoder,
                config,
                request.plain,
                request.data,
                request.device,
                request.precision,
            )
    text, place = parts.pipeline.text, request.text_device
    if place is not None and waiting(text):
        text.to(place)  # where all is encoded; others are faster where they are
    if config.until != "autoencoder":
        source.prepare(processes)
    if place is not None:
        for module in (parts.pipeline, state.ema.module):
            module.text.to(place)


def prepare_scores(request: TrainingRequest) -> tuple[CLIPPair, Shapes] | None:
    """The CLIP that measures and the images it compares with, if scores are asked for."""
    if not request.scored:
        return None
    return clip_for_metrics(request.config, request.plain, request.device, request.precision)


def encode_prompts(request: TrainingRequest, parts: Parts, validation: Validation) -> None:
    """Encode the prompts of all evaluations, where the encoders are in memory only for that."""
    prior = own_prediction(request.config, parts.pipeline)
    prompts = [*validation.captions, *validation.prompts, ""]
    if prior is not None:
        prompts.append(prior.prompt)
    with request.precision():
        remember(parts.pipeline.text, prompts, shown=request.processes.main)


def fit(
    request: TrainingRequest,
    parts: Parts,
    source: LatentSource,
    run: RunFolder,
    validation: Validation,
    aligned: PostTraining | None = None,
) -> Checkpoint:
    """Train to the last step, on the data or on what the model makes itself."""
    config, pipeline = request.config, parts.pipeline
    if request.processes.main:
        report_formulation(pipeline.objective, run.path)
        for remark in pipeline.text.remarks_on_captions(validation.captions):
            log.warning("note: in the validation split, %s", remark)
    task: Task | None = student_task(request, parts, source, validation)
    if aligned is not None:
        task = aligned.task(request, parts, validation)
    if task is None:
        task = FlowTask(
            module=pipeline,
            source=source,
            validation=validation,
            seed=config.seed,
            autocast=request.precision,
            prior=own_prediction(config, pipeline),
        )
    return train(
        task,
        parts.state,
        run=run,
        settings=request.settings,
        seed=config.seed,
        logger=request.logger,
        processes=request.processes,
        parallel=parts.parallel,
        config=request.plain,
        probe=probe_of(request),
        collector=None if aligned is None else aligned.collector,
    )


def probe_of(request: TrainingRequest) -> Probe | None:
    """What measures the model at every evaluation beside the validation, if the config has it."""
    if request.config.get("probe") is None:
        return None
    probe: Probe = instantiate(request.config.probe)(autocast=request.precision)
    return probe


def validation_of(data: Data, count: int) -> Validation:
    """The first `count` images of the validation split, and the prompts to sample from."""
    images, captions, extra = data.square(range(min(count, len(data))))
    # What else a network reads belongs to these captions.
    prompts = [] if extra else data.prompts()
    return Validation(images, captions, prompts or captions[:16], extra)


def score(
    request: TrainingRequest,
    parts: Parts,
    run: RunFolder,
    checkpoint: Checkpoint,
    measure: tuple[CLIPPair, Shapes] | None,
) -> None:
    """Measure the trained model by the paper's protocol, if scores are asked for."""
    if measure is None:
        return
    config = request.config
    write_scores(
        config,
        run.path,
        checkpoint,
        {"ema": parts.state.ema.module, "raw": parts.pipeline},
        *measure,
        config.variant or sweep_label() or config.name,
        request.precision,
    )


def report(
    request: TrainingRequest, run: Path, checkpoint: Checkpoint, prompt: str, minutes: float
) -> None:
    """Say what came out, where it is, and what one does with it."""
    figures = checkpoint.metrics
    log.info("finished %s in %.1f minutes", run, minutes)
    log.info("  validation  %.4f EMA, %.4f raw", figures["ema/loss"], figures["raw/loss"])
    if skipped := figures.get("skipped_steps"):
        log.warning("  left out    %d of %d steps, not finite", skipped, checkpoint.step)
    samples = run / "samples" / f"{checkpoint.folder.name}.png"
    log.info("  samples     %s", samples if samples.is_file() else "none: they were not finite")
    log.info("  curves      %s", run / "loss.png")
    log.info("  metrics     %s", run / "metrics.jsonl")
    log.info("  checkpoint  %s", checkpoint.folder)
    opened = f"checkpoint={shlex.quote(str(run))}"
    if imports := request.config.imports:
        opened += " " + shlex.quote(f"imports=[{','.join(imports)}]")
    log.info("sample from it: %s %s prompt=%s", command("sample"), opened, shlex.quote(prompt))
    if request.config.get("adapter") is not None:
        exported = f"{shlex.quote(str(run))} {shlex.quote(request.config.name)}.safetensors"
        log.info("export it:      python -m mmdit.export %s --dialect comfyui", exported)
    if request.data.name == "shapes":
        log.info("measure it:     %s %s", command("eval/compositional"), opened)


@contextmanager
def closing(request: TrainingRequest, run: RunFolder | None) -> Iterator[None]:
    """Close all at the end of the block, and after a signal say how to go on.

    Args:
        run: what is trained; None is a stage, which the same command goes on with.
    """
    try:
        yield
    except (Interrupted, Unfinished) as stop:
        if request.processes.main:
            again = "the same command" if run is None else run.command()
            show("", f"stopped by {stop}", f"to go on: {again}", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        request.logger.close()
        leave()


def main() -> None:
    """Train a text-to-image model, as the command line asks."""
    store_formulations()
    following: list[str] = []

    def train_all(config: DictConfig, text: Verbatim) -> None:
        following[:] = job(config, text)

    launch(
        train_all, config_name="train", verbatim=VERBATIM, describe=describe, outlives_output=True
    )
    if following:
        replace_process(following)
