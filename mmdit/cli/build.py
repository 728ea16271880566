"""From a config to what training needs, untrained: for `train.py`, `eval/memory.py`, notebooks."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from mmdit.engine.activations import recompute
from mmdit.engine.ema import EMA
from mmdit.engine.parallel import Parallel
from mmdit.engine.state import TrainState
from mmdit.models.matching import matched
from mmdit.pipeline import Pipeline
from mmdit.printable import logger

log = logger("mmdit.train")


class Parts(NamedTuple):
    """What training changes, and how processes share it."""

    state: TrainState  # of a `Pipeline`
    parallel: Parallel

    @property
    def pipeline(self) -> Pipeline:
        """The model that is trained."""
        return cast(Pipeline, self.state.module)


def build(config: DictConfig, device: torch.device, dtype: torch.dtype) -> Parts:
    """The untrained model of a config with its average and its optimizer, placed on a device.

    Args:
        dtype: of the forward pass, in which sharded weights are exchanged.

    Example:
        >>> parts = build(compose("train"), torch.device("cpu"), torch.float32)
        >>> parts.pipeline("a red circle")
    """
    pipeline = build_pipeline(config).to(device)
    ema = EMA(pipeline, profile=instantiate(config.ema))
    parallel = instantiate(config.parallel)
    recompute(pipeline, config.activation_checkpointing)
    if config.compile:
        pipeline.mmdit.compile()
    parallel.place(pipeline, ema.module, device=device, dtype=dtype)
    state = TrainState(
        pipeline,
        ema=ema,
        optimizer=instantiate(config.optimizer)(pipeline),
        schedule=instantiate(config.schedule),
        posthoc=instantiate(config.posthoc)(pipeline) if config.get("posthoc") else None,
    )
    return Parts(state, parallel)


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


def describe(config: DictConfig) -> Iterator[str]:
    """How large the model is; built on the meta device, where weights take no memory."""
    with torch.device("meta"):
        paper, pipeline = instantiate(config.model), build_pipeline(config)
    yield f"{count(paper):,} parameters in the MMDiT, with the paper's text encoders"
    yield f"{count(pipeline.mmdit):,} in the MMDiT, with the text encoders of this config"
    yield f"{count(pipeline.text):,} in the text encoders"
    yield f"{count(pipeline.autoencoder):,} in the autoencoder"


def count(module: nn.Module) -> int:
    """Number of parameters; the position table is not one."""
    return sum(weight.numel() for weight in module.parameters())
