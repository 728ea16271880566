"""Train a text-to-image model: `python train.py`, see `python train.py --help`."""

import os

# Before torch starts its threads: ones that spin long while they wait starve a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from configs.launch import Verbatim, launch
from mmdit.checkpoints.native import load_strictly, load_tensors
from mmdit.checkpoints.runs import Checkpoint
from mmdit.data.shapes import Shapes
from mmdit.engine.ema import EMA
from mmdit.engine.loggers import Logger, NoLogger
from mmdit.engine.loop import Interrupted, Settings, how_to_resume, positive, train
from mmdit.engine.optimizers import WarmupConstant, adamw
from mmdit.engine.precision import Autocast, autocast, chosen_device
from mmdit.engine.runs import RunFolder, config_hash, open_run
from mmdit.engine.tasks import AutoencoderTask, FlowTask, encode_dataset
from mmdit.pipeline import Pipeline

log = logging.getLogger("mmdit.train")


def job(config: DictConfig, _: Verbatim) -> None:
    """Compose, build, run. All is built before anything is trained: mistakes show at once."""
    began = time.perf_counter()
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    device = chosen_device(config.device)
    precision = autocast(device, config.precision)
    data = {split: instantiate(config.data, split=split) for split in ("train", "validation")}
    pipeline = build_pipeline(config).to(device)
    optimizer = instantiate(config.optimizer)(pipeline)
    ema = EMA(pipeline, **config.training.ema)
    if config.compile:
        pipeline.mmdit.compile()
    schedule = WarmupConstant(warmup_steps=config.training.warmup_steps)
    settings = Settings.of(config.training, "training")
    Settings.of(config.autoencoder.training, "autoencoder.training")
    validation_size = positive(config.training, "validation_size", "training")
    logger: Logger = instantiate(config.logger)

    run = open_run(
        Path(config.runs), name=config.name, run=config.run, resume=config.resume, config=plain
    )
    try:
        train_or_find_autoencoder(config, plain, pipeline, ema, data, precision)
        latents, captions = encode_dataset(
            pipeline.autoencoder, data["train"], settings.samples, precision
        )
        task = FlowTask(
            module=pipeline,
            latents=latents,
            captions=captions,
            validation=data["validation"],
            validation_size=validation_size,
            seed=config.seed,
            autocast=precision,
        )
        logger.start(run.path, plain)
        checkpoint = train(
            task,
            run=run,
            settings=settings,
            seed=config.seed,
            schedule=schedule,
            optimizer=optimizer,
            ema=ema,
            logger=logger,
        )
    except Interrupted as stop:
        print(f"\nstopped by {stop}; saved in {stop.checkpoint.folder}", file=sys.stderr)
        print(f"to go on: {how_to_resume(run.path, sys.argv[1:])}", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        logger.close()
    tell_results(run.path, checkpoint, (time.perf_counter() - began) / 60)


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
    mmdit = instantiate(
        config.model,
        latent_channels=autoencoder.latent_channels,
        context_width=text.context_width,
        pooled_width=text.pooled_width,
    )
    pipeline = Pipeline(
        mmdit=mmdit,
        text=text,
        autoencoder=autoencoder.requires_grad_(False),
        objective=instantiate(config.objective),
        image_size=config.image_size,
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
    )
    pipeline.latent_size(config.image_size, config.image_size)
    return pipeline


def train_or_find_autoencoder(
    config: DictConfig,
    plain: dict[str, Any],
    pipeline: Pipeline,
    ema: EMA[Pipeline],
    data: dict[str, Shapes],
    precision: Autocast,
) -> None:
    """Give pipeline and average the trained autoencoder of this config, training it if need be."""
    recipe = {key: plain[key] for key in ("autoencoder", "data", "seed", "precision")}
    run = RunFolder(Path(config.runs) / f"autoencoder-{config_hash(recipe)}")
    checkpoint = run.latest()
    if checkpoint is None or not checkpoint.finished:
        log.info("training the autoencoder in %s", run.path)
        checkpoint = train_autoencoder(config, run, pipeline, data, precision)
    else:
        log.info("reusing the autoencoder of %s", run.path)
    log.info("autoencoder: PSNR %.2f dB", checkpoint.figures["ema/psnr"])
    path = checkpoint.verified("ema.safetensors")
    for holder in (pipeline, ema.module):
        load_strictly(holder.autoencoder, load_tensors(path)[0], path)
    run.close()


def train_autoencoder(
    config: DictConfig,
    run: RunFolder,
    pipeline: Pipeline,
    data: dict[str, Shapes],
    precision: Autocast,
) -> Checkpoint:
    """The first stage: reconstruction, with the same loop as the flow."""
    recipe = config.autoencoder
    torch.manual_seed(config.seed)
    module = instantiate(recipe.model).to(pipeline.device)
    task = AutoencoderTask(
        module=module,
        data=data["train"],
        validation=data["validation"],
        kl_weight=recipe.kl_weight,
        seed=config.seed,
        autocast=precision,
    )
    return train(
        task,
        run=run,
        settings=Settings.of(recipe.training, "autoencoder.training"),
        seed=config.seed,
        schedule=WarmupConstant(warmup_steps=recipe.warmup_steps),
        optimizer=adamw(module, lr=recipe.lr, betas=(0.9, 0.99)),
        ema=EMA(module, **recipe.ema),
        logger=NoLogger(),
    )


def tell_results(run: Path, checkpoint: Checkpoint, minutes: float) -> None:
    """What came out, where it is, and what to do with it."""
    figures = checkpoint.figures
    log.info("finished %s in %.1f minutes", run, minutes)
    log.info("  validation  %.4f EMA, %.4f raw", figures["ema/loss"], figures["raw/loss"])
    log.info("  samples     %s", run / "samples" / f"{checkpoint.folder.name}.png")
    log.info("  curves      %s", run / "loss.png")
    log.info("  metrics     %s", run / "metrics.jsonl")
    log.info("  checkpoint  %s", checkpoint.folder)
    log.info('paint with it:  python sample.py prompt="a red circle above a blue square"')
    log.info("measure it:     python eval/compositional.py checkpoint=%s", run)


if __name__ == "__main__":
    launch(job, config_name="train", describe=describe)
