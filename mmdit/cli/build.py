"""From a config to what training needs, untrained: for `train.py`, `eval/memory.py`, notebooks."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from mmdit.adapters.adapter import adapter_in
from mmdit.adapters.low_bit import KINDS, quantize
from mmdit.adapters.words import start_words
from mmdit.checks import one_of
from mmdit.cli.initial import DTYPES, Initial, given_keys, open_initial, select
from mmdit.cli.students import opponent_of
from mmdit.engine.activations import recompute
from mmdit.engine.ema import EMA
from mmdit.engine.parallel import Parallel, world_size
from mmdit.engine.state import TrainState
from mmdit.errors import UserError
from mmdit.models.matching import matched
from mmdit.nn.stored import compute_in_float32
from mmdit.pipeline import Pipeline
from mmdit.printable import logger
from mmdit.text.waiting import waiting

log = logger("mmdit.train")
ADAPTER = "adapter"  # the name of what is trained


class Parts(NamedTuple):
    """What training changes, and how processes share it."""

    state: TrainState  # of a `Pipeline`
    parallel: Parallel

    @property
    def pipeline(self) -> Pipeline:
        """The model that is trained."""
        return cast(Pipeline, self.state.module)


def build(
    config: DictConfig, device: torch.device, dtype: torch.dtype, initial: Initial | None = None
) -> Parts:
    """The untrained model of a config with its average and its optimizer, placed on a device.

    Args:
        dtype: of the forward pass, in which sharded weights are exchanged.
        initial: weights to start from; None is random weights.

    Example:
        >>> parts = build(compose("train"), torch.device("cpu"), torch.float32)
        >>> parts.pipeline("a red circle")
    """
    pipeline = build_pipeline(config) if initial is None else initial.pipeline
    if initial is not None:
        make_trainable(config, pipeline, initial.base)
    if dtype == torch.float32 and config.base_dtype not in KINDS:
        compute_in_float32(pipeline)
    pipeline.to(device)
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
        kept=partial(adapter_in, name=ADAPTER, base=initial and initial.base)
        if config.get("adapter") is not None
        else None,
        opponent=opponent_of(config, pipeline),
    )
    return Parts(state, parallel)


def make_trainable(
    config: DictConfig, pipeline: Pipeline, base: Mapping[str, Any] | None = None
) -> None:
    """Let of a model be trained what the config says: parts of it, or an adapter beside them.

    Args:
        base: what a new adapter states about the weights of `pipeline`.

    Raises:
        UserError: the config asks for what the model does not have.
    """
    if config.get("adapter") is None:
        if config.base_dtype is not None:
            raise UserError("base_dtype is for what adapters leave as it is: give adapter=, too")
        select(pipeline, config.train)
        if config.start_words is not None:
            start_words(pipeline.text, config.start_words)
            for word, others in config.start_words.items():
                log.info("%s begins as the mean of %s", word, ", ".join(others))
        return
    for key in ("train", "posthoc"):
        if config.get(key) is not None:
            raise UserError(f"{key} and adapter exclude each other: adapter.parts says where it is")
    if config.start_words is not None:
        raise UserError(
            "start_words changes the model, and an adapter leaves it as it is: "
            "adapter=textual_inversion has adapter.start"
        )
    pipeline.requires_grad_(False)
    if config.base_dtype is not None:
        freeze_in(pipeline, config.base_dtype)
    torch.manual_seed(config.seed)
    pipeline.load_lora(instantiate(config.adapter)(pipeline, base=base), name=ADAPTER)


def freeze_in(pipeline: Pipeline, dtype: str) -> None:
    """Store the network in fp32, bf16, int8 or fp8, and the text encoders in at least 16 bits.

    Raises:
        UserError: the dtype is unknown, torchao is missing, or processes share the weights.
    """
    one_of("base_dtype", dtype, (*DTYPES, *KINDS))
    if dtype in KINDS and world_size() > 1:
        raise UserError(f"base_dtype={dtype} is for one process: choose base_dtype=bf16")
    pipeline.text.to(DTYPES.get(dtype, torch.bfloat16))
    if dtype in KINDS:
        quantize(pipeline.mmdit, dtype)
    else:
        pipeline.mmdit.to(DTYPES[dtype])


def build_pipeline(config: DictConfig) -> Pipeline:
    """The untrained model; its weights follow from the seed.

    With `train` or `adapter` it stands for a model that has weights, in predictions of memory.
    """
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
    if config.get("adapter") is not None or config.get("train") is not None:
        make_trainable(config, pipeline)
    return pipeline


def describe(config: DictConfig) -> Iterator[str]:
    """How large the model is; built on the meta device, where weights take no memory."""
    if config.initial is not None:
        initial = open_initial(config, given_keys())
        assert initial is not None
        pipeline = initial.pipeline
        make_trainable(config, pipeline)
        yield f"{count(pipeline.mmdit):,} parameters in the MMDiT of initial={config.initial}"
        encoders = count(pipeline.text) + sum(e.weights for e in waiting(pipeline.text).values())
        yield f"{encoders:,} in the text encoders"
        trained = sum(weight.numel() for weight in pipeline.parameters() if weight.requires_grad)
        yield f"{trained:,} are trained"
        return
    with torch.device("meta"):
        paper, pipeline = instantiate(config.model), build_pipeline(config)
    yield f"{count(paper):,} parameters in the MMDiT, with the paper's text encoders"
    yield f"{count(pipeline.mmdit):,} in the MMDiT, with the text encoders of this config"
    yield f"{count(pipeline.text):,} in the text encoders"
    yield f"{count(pipeline.autoencoder):,} in the autoencoder"


def count(module: nn.Module) -> int:
    """Number of parameters; the position table is not one."""
    return sum(weight.numel() for weight in module.parameters())
