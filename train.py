"""Train a text-to-image model: `python train.py`, see `python train.py --help`."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from configs.launch import Verbatim, launch
from mmdit.checkpoints.native import load_module
from mmdit.checkpoints.runs import Checkpoint
from mmdit.engine.ema import EMA
from mmdit.engine.loggers import Logger, NoLogger
from mmdit.engine.loop import Interrupted, Settings, how_to_resume, train
from mmdit.engine.optimizers import WarmupConstant, adamw
from mmdit.engine.precision import autocast, chosen_device
from mmdit.engine.runs import RunFolder, config_hash, open_run
from mmdit.engine.tasks import AutoencoderTask, FlowTask, encode_dataset
from mmdit.models.autoencoder import Autoencoder
from mmdit.pipeline import Pipeline

log = logging.getLogger("mmdit.train")


def job(config: DictConfig, _: Verbatim) -> None:
    """Compose, build, run."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    began = time.perf_counter()
    run = open_run(
        Path(config.runs), name=config.name, run=config.run, resume=config.resume, config=plain
    )
    logger: Logger = instantiate(config.logger)
    try:
        autoencoder = trained_autoencoder(config, plain)
        logger.start(run.path, plain)
        checkpoint = train_flow(config, autoencoder, run, logger)
    except Interrupted as stop:
        print(f"\nstopped by {stop}; saved in {stop.checkpoint.folder}", file=sys.stderr)
        print(f"to go on: {how_to_resume(run.path, sys.argv[1:])}", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        logger.close()
    minutes = (time.perf_counter() - began) / 60
    log.info("finished %s in %.1f minutes", run.path, minutes)
    figures = checkpoint.figures
    log.info("  loss        %.4f EMA, %.4f raw", figures["ema/loss"], figures["raw/loss"])
    log.info("  samples     %s", run.path / "samples" / f"{checkpoint.folder.name}.png")
    log.info("  curves      %s", run.path / "loss.png")
    log.info("  metrics     %s", run.path / "metrics.jsonl")
    log.info("  checkpoint  %s", checkpoint.folder)
    log.info('paint with it:  python sample.py prompt="a red circle above a blue square"')
    log.info("measure it:     python eval/compositional.py checkpoint=%s", run.path)


def trained_autoencoder(config: DictConfig, plain: dict[str, Any]) -> Autoencoder:
    """The autoencoder of this config: found where an earlier run left it, or trained now."""
    recipe = {key: plain[key] for key in ("autoencoder", "data", "seed", "precision")}
    run = RunFolder(Path(config.runs) / f"autoencoder-{config_hash(recipe)}")
    checkpoint = run.latest()
    if checkpoint is None or not checkpoint.finished:
        log.info("training the autoencoder in %s", run.path)
        checkpoint = train_autoencoder(config, run)
    else:
        log.info("reusing the autoencoder of %s", run.path)
    log.info("autoencoder: PSNR %.2f dB", checkpoint.figures["ema/psnr"])
    module = load_module(checkpoint.verified("ema.safetensors"))
    run.close()
    assert isinstance(module, Autoencoder)
    return module


def train_autoencoder(config: DictConfig, run: RunFolder) -> Checkpoint:
    """Build the autoencoder's task and train it."""
    recipe = config.autoencoder
    torch.manual_seed(config.seed)
    device = chosen_device(config.device)
    module = instantiate(recipe.model).to(device)
    task = AutoencoderTask(
        module=module,
        data=instantiate(config.data, split="train"),
        validation=instantiate(config.data, split="validation"),
        kl_weight=recipe.kl_weight,
        seed=config.seed,
        autocast=autocast(device, config.precision),
    )
    return train(
        task,
        run=run,
        settings=Settings(**recipe.training),
        samples=config.training.samples,
        seed=config.seed,
        schedule=WarmupConstant(warmup_steps=recipe.warmup_steps),
        optimizer=adamw(module, lr=recipe.lr, betas=(0.9, 0.99)),
        ema=EMA(module, **recipe.ema),
        logger=NoLogger(),
    )


def train_flow(
    config: DictConfig, autoencoder: Autoencoder, run: RunFolder, logger: Logger
) -> Checkpoint:
    """Build the pipeline and its task, and train it on the autoencoder's latents."""
    torch.manual_seed(config.seed)
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
    device = chosen_device(config.device)
    pipeline.to(device)
    data = instantiate(config.data, split="train")
    precision = autocast(device, config.precision)
    latents, captions = encode_dataset(autoencoder, data, config.training.samples, precision)
    task = FlowTask(
        module=pipeline,
        latents=latents,
        captions=captions,
        validation=instantiate(config.data, split="validation"),
        validation_size=config.training.validation_size,
        seed=config.seed,
        autocast=precision,
    )
    return train(
        task,
        run=run,
        settings=Settings(**{name: config.training[name] for name in Settings._fields}),
        samples=config.training.samples,
        seed=config.seed,
        schedule=WarmupConstant(warmup_steps=config.training.warmup_steps),
        optimizer=instantiate(config.optimizer)(pipeline),
        ema=EMA(pipeline, **config.training.ema),
        logger=logger,
    )


if __name__ == "__main__":
    launch(job, config_name="train")
