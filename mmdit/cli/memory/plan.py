"""The setting of `eval/memory.py`, and the training task that it simulates and measures."""

import os
from typing import Any, NamedTuple

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mmdit.adapters.low_bit import KINDS
from mmdit.checks import flag, one_of, whole_number
from mmdit.cli import CONFIGS
from mmdit.devices import available
from mmdit.engine.activations import ACTIVATIONS
from mmdit.engine.footprint import (
    Share,
)
from mmdit.engine.optimizers import adamw_8bit
from mmdit.engine.parallel import FSDP, Single
from mmdit.engine.tasks import Captioned, FlowTask
from mmdit.engine.validation import Validation
from mmdit.errors import UserError
from mmdit.flow.objective import Draw
from mmdit.latents.sources import FromPixels
from mmdit.parity.random_weights import ENCODERS
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast, chosen_dtype
from mmdit.processes import own_device
from mmdit.text.conditioning import TokenIds

SMALL = 16  # patches per side of a toy's largest images


class Plan(NamedTuple):
    """The setting in which memory is predicted and measured."""

    config: DictConfig  # with all values filled in
    device: torch.device
    dtype: torch.dtype  # dtype of the forward pass
    world_size: int
    batch: int  # samples per process and forward pass

    @property
    def share(self) -> Share | None:
        """Each process's share of every weight; None if processes have full weights."""
        parallel = instantiate(self.config.parallel)
        if not isinstance(parallel, FSDP):
            return None
        return Share(self.world_size // parallel.replicas)


def planned(config: DictConfig) -> Plan:
    """Fill in values that are null in the config, and check all of them.

    Raises:
        UserError: a value is invalid, or does not fit the others.
    """
    if config.initial is not None:
        raise UserError(
            f"initial={config.initial}: memory is predicted from the architecture alone: leave it "
            "out; model=d24 is SD3 Medium, sd35_medium SD3.5 Medium, d38 SD3.5 Large"
        )
    config = filled(config)
    for key in ("student", "algorithm"):
        if config.get(key) is not None:
            raise UserError(
                f"{key}: memory of students and of post-training, with the copies of the model "
                f"that they keep, is not predicted; leave {key} out"
            )
    flag("measure", config.measure)
    if config.compile:
        raise UserError("compile=true: memory of compiled blocks is not predicted; leave it out")
    if config.base_dtype in KINDS:
        raise UserError(
            f"base_dtype={config.base_dtype}: memory of weights in 8 bits is not predicted; the "
            "prediction for base_dtype=bf16 is more than they take"
        )
    one_of("activation_checkpointing", config.activation_checkpointing, ACTIVATIONS)
    unknown = sorted(set(map(str, config.encoders or [])) - ENCODERS.keys())
    if isinstance(config.encoders, str) or unknown:
        raise UserError(
            f"encoders={config.encoders} must be a list of some of {', '.join(ENCODERS)}"
        )
    if config.measure:
        if config.encoders:
            raise UserError(
                f"encoders={config.encoders} are only predicted: leave out measure=true"
            )
        device = own_device(available(config.device))
    elif config.device not in ("auto", "cuda", "cpu"):
        raise UserError(f"device={config.device} must be auto, cuda or cpu")
    else:
        device = torch.device("cpu" if config.device == "cpu" else "cuda")
    if config.measure or device.type == "cpu" or config.precision not in ("auto", "bf16"):
        dtype = chosen_dtype(device, config.precision)
    else:
        dtype = torch.bfloat16
    world_size = counted_processes(config)
    return Plan(config, device, dtype, world_size, batch_of(config, world_size))


def filled(config: DictConfig) -> DictConfig:
    """Fill in null values: the toy's autoencoder and text for a small model, else SD3's."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    small = config.model.position_grid <= SMALL
    if config.get("autoencoder") is None:
        name = "toy" if small else "sd3"
        config.autoencoder = OmegaConf.load(CONFIGS / "autoencoder" / f"{name}.yaml")
    if config.get("text") is None:
        toy = CONFIGS / "text" / "toy.yaml"
        config.text = OmegaConf.load(toy) if small else config.published
    if config.image_size is None:
        with torch.device("meta"):
            factor = instantiate(config.autoencoder.model).factor
        config.image_size = config.model.position_grid * config.model.patch_size * factor
    whole_number("image_size", config.image_size)
    return config


def counted_processes(config: DictConfig) -> int:
    """The number of processes that train together."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    count = started if config.world_size is None else whole_number("world_size", config.world_size)
    parallel = instantiate(config.parallel)
    if config.measure and count != started:
        raise UserError(
            f"world_size={count}, but measure=true uses the {started} running processes: leave it "
            f"out, and start them with torchrun --nproc_per_node={count}"
        )
    if isinstance(parallel, Single) and count > 1:
        raise UserError(f"parallel=single needs world_size=1, not {count}: choose ddp or fsdp")
    if isinstance(parallel, FSDP):
        if count % parallel.replicas:
            raise UserError(
                f"parallel.replicas {parallel.replicas} must divide the number of processes, "
                f"world_size={count}"
            )
        if is_8bit(config):
            raise UserError("parallel=fsdp cannot shard optimizer=adamw_8bit: choose ddp")
    return count


def batch_of(config: DictConfig, world_size: int) -> int:
    """Samples per process and forward pass."""
    whole_number("training.accumulation", config.training.accumulation)
    if config.batch is not None:
        return whole_number("batch", config.batch)
    size = whole_number("training.batch_size", config.training.batch_size)
    parts = world_size * config.training.accumulation
    if size % parts:
        raise UserError(
            f"training.batch_size={size} must be divisible by world_size x training.accumulation, "
            f"{parts}; or give batch=<samples per process and forward pass>"
        )
    return size // parts


def is_8bit(config: DictConfig) -> bool:
    """Whether the optimizer stores moments in 8 bits."""
    return get_object(config.optimizer._target_) is adamw_8bit


# The step that is simulated and measured


class _Given:
    """A source whose input already consists of latents."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def latents(self, x: Tensor) -> Tensor:
        return x.to(self.device).float()


def task_of(plan: Plan, pipeline: Pipeline, precision: Autocast) -> FlowTask:
    """The training task of `train.py`, with a validation set of one image."""
    device, side = pipeline.device, plan.config.image_size
    source: Any = _Given(device)
    if get_object(plan.config.latents._target_) is FromPixels:
        source = FromPixels(
            data=None,  # type: ignore[arg-type]
            autoencoder=pipeline.autoencoder,
            text=pipeline.text,
            autocast=precision,
        )
    image = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
    return FlowTask(
        module=pipeline,
        source=source,
        validation=Validation(image, [""], [""]),
        seed=0,
        autocast=precision,
    )


def example_of(plan: Plan, pipeline: Pipeline) -> Captioned:
    """A batch of one process; memory does not depend on its values."""
    b, device, side = plan.batch, pipeline.device, plan.config.image_size
    shape = (b, pipeline.mmdit.latent_channels, *pipeline.latent_size(side, side))
    with torch.device(device):
        x = torch.zeros(shape, dtype=torch.bfloat16)
        if get_object(plan.config.latents._target_) is FromPixels:
            x = torch.zeros(b, side, side, 3, dtype=torch.uint8)
        ids = (
            torch.zeros(b, encoder.length, dtype=torch.int64) for encoder in pipeline.text.encoders
        )
        draw = Draw(torch.full((b,), 0.5), torch.zeros(shape))
        kept, preserved = torch.ones(b, 3, dtype=torch.bool), torch.zeros(b, dtype=torch.bool)
        return Captioned(x, TokenIds(*ids), kept, draw, {}, seed=0, preserved=preserved)
