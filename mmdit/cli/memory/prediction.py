"""Predicts a process's memory: constants by counting, the rest by simulating a step."""

import copy
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mmdit.cli.build import build_pipeline
from mmdit.cli.memory.plan import Plan, example_of, is_8bit, task_of
from mmdit.engine.activations import recompute
from mmdit.engine.ema import EMA, local
from mmdit.engine.footprint import (
    CAST,
    GRADIENTS,
    KEPT,
    WEIGHTS,
    AsOnCUDA,
    Gathering,
    Ledger,
    bytes_of,
)
from mmdit.engine.parallel import DDP
from mmdit.engine.posthoc import PostHoc
from mmdit.nn.network import set_compute_dtype
from mmdit.parity.random_weights import ENCODERS
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.registry import build

FROZEN, MOMENTS, AVERAGES = "frozen parts", "moments", "averages"
CLASSES = (WEIGHTS, AVERAGES, MOMENTS, FROZEN, CAST, GRADIENTS, KEPT)


class Footprint(NamedTuple):
    """Bytes of one process."""

    peak: dict[str, int]  # by class, at the peak of the total
    largest: dict[str, int]  # by class, each at its own peak
    kept: int  # kept by the forward pass for the backward pass
    gradients: int  # left by the backward pass for the optimizer

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def predict(plan: Plan) -> Footprint:
    """Predict the bytes of each process."""
    with torch.device("meta"):
        pipeline = build_pipeline(plan.config)
    constant = constant_bytes(plan, pipeline)
    if plan.device.type == "cpu":
        with FakeTensorMode(allow_non_fake_inputs=True):
            ledger, kept, gradients = rehearse(plan, pipeline.to_empty(device="cpu"))
    else:
        ledger, kept, gradients = rehearse(plan, pipeline)
    if isinstance(instantiate(plan.config.parallel), DDP):  # in buckets that are never freed
        constant[GRADIENTS] = gradients = bytes_of(trained(pipeline))
    peak = constant + ledger.peak
    largest = constant + ledger.largest
    return Footprint(
        peak={name: peak[name] for name in CLASSES},
        largest={name: largest[name] for name in CLASSES},
        kept=kept,
        gradients=gradients,
    )


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The weights that are trained."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def constant_bytes(plan: Plan, pipeline: Pipeline) -> Counter[str]:
    """Bytes of one process that persist from step to step, by class."""
    config, share = plan.config, plan.share
    held = copy.deepcopy(pipeline)
    if share is not None:
        for weight in trained(held):
            weight.data = weight.data.new_empty(share(weight.shape))
    ema = EMA(held, profile=instantiate(config.ema))
    posthoc = instantiate(config.posthoc)(held) if config.get("posthoc") else None
    found = classes_of(held, ema, posthoc)
    found[MOMENTS] = moments_of_8bit(held) if is_8bit(config) else moments_on_cpu(config, held)
    with torch.device("meta"):
        encoders = [build(ENCODERS[name]) for name in config.encoders or ()]
    found[FROZEN] += sum(w.numel() * 2 for encoder in encoders for w in encoder.parameters())
    return found


def classes_of(pipeline: Pipeline, ema: EMA[Any], posthoc: PostHoc | None) -> Counter[str]:
    """Bytes of weights, averages and frozen parts, including the average's own frozen copies."""
    pairs = zip(pipeline.parameters(), ema.module.parameters(), strict=True)
    averages = [local(average) for weight, average in pairs if weight.requires_grad]
    if posthoc is not None:
        averages += [local(t) for own in posthoc.averages.values() for t in own.values()]
    weights = [local(weight) for weight in trained(pipeline)]
    all_of_it = [*weights, *averages]
    for module in (pipeline, ema.module):
        all_of_it += [local(tensor) for tensor in (*module.parameters(), *module.buffers())]
    found = Counter({WEIGHTS: bytes_of(weights), AVERAGES: bytes_of(averages)})
    found[FROZEN] = bytes_of(all_of_it) - found.total()
    return found


def moments_on_cpu(config: DictConfig, module: nn.Module) -> int:
    """Bytes that the optimizer keeps after a step."""
    module = copy.deepcopy(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        optimizer = instantiate(config.optimizer)(module)
        for weight in trained(module):
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        return bytes_of(moments_in(optimizer))


def moments_in(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Tensors of an optimizer's state in this process; 8-bit moments as their parts."""
    found: list[Tensor] = []
    for state in optimizer.state.values():
        for value in state.values():
            if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
                found += [getattr(value, part) for part in value.__tensor_flatten__()[0]]
            elif isinstance(value, Tensor):
                found.append(local(value))
    return found


def moments_of_8bit(module: nn.Module) -> int:
    """Bytes of 8-bit moments: per moment, a byte per value, a float32 scale per 256, and a table.

    Moments of small weights are float32.
    """
    total = 0
    for weight in trained(module):
        n = weight.numel()
        total += 2 * (4 * n if n < 4096 or n % 256 else n + 4 * (n // 256) + 4 * 256)
    return total


def rehearse(plan: Plan, pipeline: Pipeline) -> tuple[Ledger, int, int]:
    """Simulate a step on tensors without values.

    Returns:
        The ledger, and the bytes kept by the forward and by the backward pass.
    """
    config, share, ledger = plan.config, plan.share, Ledger()
    buckets = isinstance(instantiate(config.parallel), DDP)
    pipeline.train()
    precision: Autocast = nullcontext
    if plan.device.type == "cuda":
        mode = AsOnCUDA(plan.dtype)
        mode.enter_again(pipeline)
        precision = lambda: mode  # noqa: E731 (its cache of casts is cleared at each exit)
    elif plan.dtype == torch.bfloat16:
        precision = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    recompute(pipeline, config.activation_checkpointing)
    gathered: list[Gathering] = []
    for part in pipeline.children():
        if share is not None and trained(part):
            for weight in part.parameters():
                weight.data = weight.data.to(plan.dtype)
            set_compute_dtype(part, plan.dtype)
            gathered.append(Gathering(part, ledger, share, gloo=plan.device.type == "cpu"))
    for tensor in (*pipeline.parameters(), *pipeline.buffers()):
        known = WEIGHTS if tensor.requires_grad else FROZEN
        ledger.claim(tensor, known, counted=False)
    task = task_of(plan, pipeline, precision)

    last = True

    def arrived(weight: Tensor) -> None:
        assert weight.grad is not None
        ledger.claim(weight.grad, GRADIENTS)
        if buckets and last:
            weight.grad = None

    for weight in trained(pipeline) if share is None else ():
        weight.register_post_accumulate_grad_hook(arrived)
    with ledger:
        example = example_of(plan, pipeline)
        for left in reversed(range(min(2, config.training.accumulation))):
            last = left == 0
            for gathering in gathered:
                gathering.quiet = not last
            before = ledger.held.total()
            losses = task.loss(example)
            kept = ledger.held.total() - before
            losses.mean().backward()
            for gathering in gathered:
                gathering.finish()
        return ledger, kept, ledger.held[GRADIENTS]
