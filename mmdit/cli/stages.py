"""Stages that a run depends on, trained once and then reused.

The autoencoder, and the small CLIP of toy metrics, are trained by the same loop as the flow, in
`runs/<stage>-<hash of its recipe>/`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from mmdit.atomic import write_atomically
from mmdit.checks import number, one_of, seed_number, whole_number
from mmdit.data.dataset import Data
from mmdit.data.shapes import Shapes
from mmdit.engine.contrastive import ContrastiveTask
from mmdit.engine.ema import EMA, ConstantDecay
from mmdit.engine.loggers import NoLogger
from mmdit.engine.loop import train
from mmdit.engine.optimizers import adamw
from mmdit.engine.schedules import WarmupConstant
from mmdit.engine.settings import Settings
from mmdit.engine.state import TrainState
from mmdit.engine.tasks import AutoencoderTask, Task
from mmdit.errors import UserError
from mmdit.latents.sources import FromCache, LatentSource
from mmdit.models.autoencoder import Autoencoder
from mmdit.precision import Autocast
from mmdit.printable import logger
from mmdit.recipes import config_hash
from mmdit.runs.checkpoint import Checkpoint, checkpoints_in
from mmdit.runs.folder import RunFolder
from mmdit.runs.native import Weights, load_strictly
from mmdit.runs.status import clean_up_if_killed
from mmdit.text.clip_pair import CLIPPair

log = logger("mmdit.stages")


UNTIL = ("autoencoder", "cache")


def check_until(until: str, source: LatentSource) -> None:
    """Raise UserError unless `until` is a stage of this config after which training can stop."""
    one_of("until", until, UNTIL)
    if until == "cache" and not isinstance(source, FromCache):
        raise UserError("until=cache needs latents=from_cache, for which the cache is written")


def check_recipe(config: DictConfig, stage: str) -> None:
    """Validate the config of a stage before anything is trained.

    Raises:
        UserError: a setting is invalid; the message names its key.
    """
    recipe = config[stage]
    Settings.of(recipe.training, f"{stage}.training")
    number(f"{stage}.lr", recipe.lr, 0)
    whole_number(f"{stage}.warmup_steps", recipe.warmup_steps, 0)
    number(f"{stage}.ema.decay", recipe.ema.decay, 0, below=1)
    every, steps = whole_number(f"{stage}.ema.every", recipe.ema.every), recipe.training.steps
    if every > steps:
        log.warning(
            "note: %s.ema.every=%d is more than %s.training.steps=%d: the averaged weights, which "
            "are used, stay at their random initial values",
            *(stage, every, stage, steps),
        )
    if stage == "autoencoder":
        seed_number("autoencoder.seed", config.autoencoder.seed)
        number("autoencoder.kl_weight", recipe.kl_weight, 0)
    else:
        whole_number("clip.samples", config.clip.samples)
        seed_number("metrics.seed", config.metrics.seed)


def find_or_train(
    config: DictConfig,
    stage: str,
    recipe: dict[str, Any],
    build_task: Callable[[nn.Module], Task],
    device: torch.device,
    *,
    seed: int,
) -> Weights:
    """The averaged weights of a stage, from a finished run of the same recipe or trained now.

    Args:
        config: config of the job.
        stage: 'autoencoder' or 'clip', a section of `config` with model, training, lr and ema.
        recipe: everything that determines the stage's weights.
        build_task: the training task for a newly initialized module.
        device: where to train.
        seed: seed of the initial weights and of the order of data.
    """
    path = Path(str(config.runs)) / f"{stage}-{config_hash(recipe)}"
    trained = trained_in(path, stage)
    if trained is not None:
        log.info("reusing the %s of %s", stage, path)
        clean_up_if_killed(path)
    else:
        run = RunFolder(path, wait=True)
        trained = trained_in(path, stage)  # perhaps trained meanwhile by another process
        if trained is None:
            log.info("training the %s in %s", stage, path)
            write_atomically(path / "recipe.json", json.dumps(recipe, indent=1).encode())
            train_stage(config[stage], stage, run, build_task, device, seed)
            trained = trained_in(path, stage)
        run.close()
    assert trained is not None
    checkpoint, weights = trained
    metrics = {k: v for k, v in checkpoint.metrics.items() if k.startswith("ema/")}
    log.info("%s: %s", stage, ", ".join(f"{k[4:]} {v:.4g}" for k, v in metrics.items()))
    return weights


def trained_in(path: Path, stage: str) -> tuple[Checkpoint, Weights] | None:
    """The last checkpoint of a finished stage, and its averaged weights; None if not finished.

    The folder is only read, as it may belong to another user.

    Raises:
        UserError: a checkpoint is damaged.
    """
    try:
        found = checkpoints_in(path)
        if not found or not found[-1].finished:
            return None
        return found[-1], found[-1].read("ema")
    except UserError as error:
        raise UserError(f"{error}. Move {path} elsewhere to train the {stage} again") from error


def train_stage(
    recipe: DictConfig,
    stage: str,
    run: RunFolder,
    build_task: Callable[[nn.Module], Task],
    device: torch.device,
    seed: int,
) -> None:
    """Train a stage in its run folder."""
    torch.manual_seed(seed)
    module = instantiate(recipe.model).to(device)
    train(
        build_task(module),
        TrainState(
            module,
            ema=EMA(module, profile=ConstantDecay(**recipe.ema)),
            optimizer=adamw(module, lr=recipe.lr, betas=(0.9, 0.99)),
            schedule=WarmupConstant(warmup_steps=recipe.warmup_steps),
        ),
        run=run,
        settings=Settings.of(recipe.training, f"{stage}.training"),
        seed=seed,
        logger=NoLogger(),
    )


def load_trained_autoencoder(
    autoencoder: Autoencoder,
    config: DictConfig,
    plain: dict[str, Any],
    data: Data,
    device: torch.device,
    precision: Autocast,
) -> None:
    """Load the config's trained autoencoder into `autoencoder`, training it first if necessary.

    A public autoencoder is left as it is, because it already has its weights.
    """
    if not config.autoencoder.trained:
        return
    seed, validation = config.autoencoder.seed, data.view("validation")

    def task(module: nn.Module) -> Task:
        return AutoencoderTask(
            module=module,  # type: ignore[arg-type]
            data=data,
            truth=validation.square(range(min(64, len(validation)))).images,
            kl_weight=config.autoencoder.kl_weight,
            seed=seed,
            autocast=precision,
        )

    recipe = {
        "autoencoder": plain["autoencoder"],
        "data": images_of(plain["data"], plain["data"].get("found")),
        "precision": plain["precision"],
    }
    weights = find_or_train(config, "autoencoder", recipe, task, device, seed=seed)
    load_strictly(autoencoder, weights.tensors, weights.path)


def images_of(data: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    """What determines the images of a section `data`: neither their location nor their captions.

    Args:
        data: the section, or a part of it.
        found: the fingerprint of its images, if the config does not determine them.
    """
    if "parts" in data:
        parts = {
            name: images_of(part, (found or {}).get(name)) for name, part in data["parts"].items()
        }
        return {"parts": parts, "shares": data["shares"]}
    if not found:
        return data
    kept = ("image_size", "unit", "max_ratio", "crop", "seed")
    return {"found": found, **{key: data[key] for key in kept}}


def clip_for_metrics(
    config: DictConfig, plain: dict[str, Any], device: torch.device, precision: Autocast
) -> tuple[CLIPPair, Shapes]:
    """The CLIP that computes metrics, and its reference images, independent of the run's seed."""
    seed = config.metrics.seed
    samples = config.clip.samples
    shapes: Shapes = instantiate(config.data, seed=seed, samples=samples)
    validation = shapes.view("validation")

    def task(module: nn.Module) -> Task:
        assert isinstance(module, CLIPPair)
        return ContrastiveTask(
            module=module,
            data=shapes,
            validation=validation,
            autocast=precision,
        )

    data = {**plain["data"], "seed": seed, "samples": samples}
    recipe = {"clip": plain["clip"], "data": data, "precision": plain["precision"]}
    weights = find_or_train(config, "clip", recipe, task, device, seed=seed)
    clip = instantiate(config.clip.model).to(device).eval()
    load_strictly(clip, weights.tensors, weights.path)
    return clip, validation
