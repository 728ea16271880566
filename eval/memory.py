"""How much memory does training take in each process?

Protocol `memory-1`: bytes of tensors at the peak of a training step, by what they hold. The step is
rehearsed on tensors without values (`mmdit/engine/footprint.py`), for as many processes as asked;
weights, moments and averages are constant, gradients and activations are what they are when all
together is greatest. What the allocator adds, the CUDA context (about half a GB) and the libraries'
own workspaces come on top.

`measure=true` makes real steps with the same config and asks the allocator: of CUDA, or of the CPU
by what the profiler saw of it.
"""

import os

# Before torch starts its threads: ones that spin long while they wait starve a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


import copy
import gc
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from configs.formulations import store_formulations
from configs.launch import CONFIGS, Verbatim, launch
from eval.random_weights import ENCODERS
from eval.subject import made, table, write_results
from mmdit.engine.activations import ACTIVATIONS, recompute
from mmdit.engine.ema import EMA, local
from mmdit.engine.footprint import (
    CAST,
    GRADIENTS,
    KEPT,
    WEIGHTS,
    AsOnCUDA,
    Gathering,
    Ledger,
    Share,
    bytes_of,
)
from mmdit.engine.loader import Part
from mmdit.engine.optimizers import adamw_8bit
from mmdit.engine.parallel import DDP, FSDP, Single
from mmdit.engine.posthoc import PostHoc
from mmdit.engine.precision import Autocast, autocast, chosen_device, chosen_dtype
from mmdit.engine.processes import Processes, join, leave, own_device
from mmdit.engine.sources import FromPixels
from mmdit.engine.step import Stepper
from mmdit.engine.tasks import Captioned, FlowTask, Validation
from mmdit.errors import UserError
from mmdit.flow.objective import Draw
from mmdit.pipeline import Pipeline
from mmdit.registry import build
from mmdit.text.conditioning import TokenIds
from train import build_pipeline

PROTOCOL = "memory-1"
VERBATIM = ("out",)
SMALL = 16  # patches a side of the largest pictures that a toy is made for
FROZEN, MOMENTS, AVERAGES = "frozen parts", "moments", "averages"
CLASSES = (WEIGHTS, AVERAGES, MOMENTS, FROZEN, CAST, GRADIENTS, KEPT)


class Plan(NamedTuple):
    """What is asked for."""

    config: DictConfig  # with all that it left open
    device: torch.device
    dtype: torch.dtype  # of the forward pass
    world_size: int
    batch: int  # samples of a process at once

    @property
    def share(self) -> Share | None:
        """Of each process in every weight; None where it holds them whole."""
        parallel = instantiate(self.config.parallel)
        if not isinstance(parallel, FSDP):
            return None
        return Share(self.world_size // parallel.replicas)


class Footprint(NamedTuple):
    """Bytes of one process."""

    peak: dict[str, int]  # by class, when all together is greatest
    largest: dict[str, int]  # of each class, at its own peak
    kept: int  # what the forward pass leaves for the backward pass
    gradients: int  # what the backward pass leaves for the optimizer

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def job(config: DictConfig, text: Verbatim) -> None:
    """Compose, check, predict, measure, report."""
    processes = Processes()
    try:
        plan = planned(config)
        if config.measure:
            processes = join(plan.device, 600.0)
        predicted = predict(plan)
        measured = measure(plan, processes) if config.measure else None
    finally:
        leave()
    if not processes.main:
        return
    report = as_report(plan, predicted, measured)
    out = made(Path(text.get("out") or "results/memory"))
    write_results(out, "memory", report, as_markdown(report))


# What is asked for


def planned(config: DictConfig) -> Plan:
    """Fill in what the config leaves open, and refuse what makes no sense.

    Raises:
        UserError: a value is none, or does not fit the others.
    """
    config = filled(config)
    if not isinstance(config.measure, bool):
        raise UserError(f"measure={config.measure} must be true or false")
    if config.compile:
        raise UserError("compile=true: what compiled blocks keep is not predicted; leave it out")
    if config.activation_checkpointing not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"activation_checkpointing={config.activation_checkpointing} must be one of {known}"
        )
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
        device = own_device(chosen_device(config.device))
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
    """The toy's autoencoder and texts for a model that is made for small pictures, else SD3's."""
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
    whole(config, "image_size")
    return config


def counted_processes(config: DictConfig) -> int:
    """How many processes train together."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    count = started if config.world_size is None else whole(config, "world_size")
    parallel = instantiate(config.parallel)
    if config.measure and count != started:
        raise UserError(
            f"world_size={count}, but measure=true takes the {started} that there are: leave it "
            f"out, and start them with torchrun --nproc_per_node={count}"
        )
    if isinstance(parallel, Single) and count > 1:
        raise UserError(f"parallel=single is for one process: world_size={count} needs ddp or fsdp")
    if isinstance(parallel, FSDP):
        if count % parallel.replicas:
            raise UserError(
                f"parallel.replicas {parallel.replicas} must divide the number of processes, "
                f"world_size={count}"
            )
        if is_8bit(config):
            raise UserError("optimizer=adamw_8bit cannot be spread by parallel=fsdp: choose ddp")
    return count


def batch_of(config: DictConfig, world_size: int) -> int:
    """Samples that a process computes at once."""
    whole(config.training, "accumulation", "training.")
    if config.batch is not None:
        return whole(config, "batch")
    size = whole(config.training, "batch_size", "training.")
    parts = world_size * config.training.accumulation
    if size % parts:
        raise UserError(
            f"training.batch_size={size} must be divisible by world_size x training.accumulation, "
            f"{parts}; or give batch=<samples of a process at once>"
        )
    return size // parts


def whole(config: DictConfig, name: str, where: str = "") -> int:
    """A whole number of at least 1."""
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}{name}={value} must be a whole number of at least 1")
    return value


def is_8bit(config: DictConfig) -> bool:
    """Whether moments are kept in 8 bits."""
    return get_object(config.optimizer._target_) is adamw_8bit


# The step that is rehearsed and made


class _Given:
    """A source of latents that are there already."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def latents(self, x: Tensor) -> Tensor:
        return x.to(self.device).float()


def task_of(plan: Plan, pipeline: Pipeline, precision: Autocast) -> FlowTask:
    """What is trained, as `train.py` does, with a validation of one picture."""
    device, side = pipeline.device, plan.config.image_size
    source: Any = _Given(device)
    if get_object(plan.config.latents._target_) is FromPixels:
        source = FromPixels(
            data=None,  # type: ignore[arg-type]
            autoencoder=pipeline.autoencoder,
            text=pipeline.text,
            autocast=precision,
        )
    picture = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
    return FlowTask(
        module=pipeline,
        source=source,
        validation=Validation(picture, [""], [""]),
        seed=0,
        autocast=precision,
    )


def example_of(plan: Plan, pipeline: Pipeline) -> Captioned:
    """A batch of one process; no part of it decides how much memory is used."""
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
        return Captioned(x, TokenIds(*ids), torch.ones(b, 3, dtype=torch.bool), draw)


# Predicting


def predict(plan: Plan) -> Footprint:
    """Bytes of each process."""
    with torch.device("meta"):
        pipeline = build_pipeline(plan.config)
    constant = constant_bytes(plan, pipeline)
    if plan.device.type == "cpu":
        with FakeTensorMode(allow_non_fake_inputs=True):
            ledger, kept, gradients = rehearse(plan, pipeline.to_empty(device="cpu"))
    else:
        ledger, kept, gradients = rehearse(plan, pipeline)
    if isinstance(instantiate(plan.config.parallel), DDP):  # in buckets that are never let go
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
    """The weights that are."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def constant_bytes(plan: Plan, pipeline: Pipeline) -> Counter[str]:
    """What is there from step to step, in one process."""
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
    """Bytes of weights, averages and frozen parts, of which an average may have its own copy."""
    both = zip(pipeline.parameters(), ema.module.parameters(), strict=True)
    averages = [local(average) for weight, average in both if weight.requires_grad]
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
    """Bytes that the optimizer has kept after a step."""
    module = copy.deepcopy(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        optimizer = instantiate(config.optimizer)(module)
        for weight in trained(module):
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        return bytes_of(moments_in(optimizer))


def moments_in(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Tensors of an optimizer's state, shares of this process, 8-bit moments in their parts."""
    found: list[Tensor] = []
    for state in optimizer.state.values():
        for value in state.values():
            if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
                found += [getattr(value, part) for part in value.__tensor_flatten__()[0]]
            elif isinstance(value, Tensor):
                found.append(local(value))
    return found


def moments_of_8bit(module: nn.Module) -> int:
    """Two codes a value, a float32 scale for each 256, and a table; of small weights float32."""
    total = 0
    for weight in trained(module):
        n = weight.numel()
        total += 2 * (4 * n if n < 4096 or n % 256 else n + 4 * (n // 256) + 4 * 256)
    return total


def rehearse(plan: Plan, pipeline: Pipeline) -> tuple[Ledger, int, int]:
    """A step on tensors without values: the ledger of it; bytes kept after forward and backward."""
    config, share, ledger = plan.config, plan.share, Ledger()
    buckets = isinstance(instantiate(config.parallel), DDP)
    pipeline.train()
    precision: Autocast = nullcontext
    if plan.device.type == "cuda":
        mode = AsOnCUDA(plan.dtype)
        mode.enter_again(pipeline)
        precision = lambda: mode  # noqa: E731 (the cache of its casts is emptied at each exit)
    elif plan.dtype == torch.bfloat16:
        precision = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    recompute(pipeline, config.activation_checkpointing)
    gathered: list[Gathering] = []
    for part in pipeline.children():
        if share is not None and trained(part):
            for weight in part.parameters():
                weight.data = weight.data.to(plan.dtype)
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


# Measuring


class Gauge(Protocol):
    """What an allocator has given out."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def mark(self, name: str) -> None:
        """Note the moment: a new `step`, the `start` of a forward pass, its end (`forward`)."""

    def levels(self, moments: int) -> tuple[int, int]:
        """Of the last step, bytes kept by its forward pass and all bytes at its peak.

        Args:
            moments: bytes that the optimizer took in the first step, and kept.
        """


class CUDAGauge:
    """The allocator of CUDA, which keeps account."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def mark(self, name: str) -> None:
        self.found[name] = torch.cuda.memory_allocated(self.device)
        if name == "step":
            torch.cuda.reset_peak_memory_stats(self.device)

    def levels(self, moments: int) -> tuple[int, int]:
        peak = torch.cuda.max_memory_allocated(self.device)
        return self.found["forward"] - self.found["start"], peak


class CPUGauge:
    """The allocator of the CPU, which tells the profiler what it gives and takes.

    What threads of gloo give back it does not tell. So the last step is measured from its start,
    and what is there from step to step before anything has been exchanged.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Self:
        gc.collect()  # what is given back later would count as less than nothing
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)

    def mark(self, name: str) -> None:
        with record_function(f"memory: {name}"):
            pass

    def levels(self, moments: int) -> tuple[int, int]:
        profiler = self._profile.profiler
        assert profiler is not None and profiler.kineto_results is not None
        resting: list[int] = []  # at the start of each step
        level = peak = start = kept = 0
        events: list[Any] = sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns())
        for event in events:
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
            elif event.name() == "memory: step":
                resting.append(level)
                peak = level
            elif event.name() == "memory: start":
                start = level
            elif event.name() == "memory: forward":
                kept = level - start
        return kept, resting[0] + moments + peak - resting[-1]


def measure(plan: Plan, processes: Processes) -> dict[str, int]:
    """Bytes of this process in real steps: classes, what the forward pass keeps, and the peak."""
    config, device = plan.config, plan.device
    precision = autocast(device, config.precision)
    gauge: Gauge = CUDAGauge(device) if device.type == "cuda" else CPUGauge()
    with gauge:
        pipeline = build_pipeline(config).to(device)
        ema = EMA(pipeline, profile=instantiate(config.ema))
        parallel = instantiate(config.parallel)
        recompute(pipeline, config.activation_checkpointing)
        parallel.place(pipeline, ema.module, device=device, dtype=plan.dtype)
        optimizer = instantiate(config.optimizer)(pipeline)
        posthoc = instantiate(config.posthoc)(pipeline) if config.get("posthoc") else None
        task, example = task_of(plan, pipeline, precision), example_of(plan, pipeline)
        gradients, begun = 0, False

        def loss(example: Captioned) -> Tensor:
            nonlocal begun
            if not begun:  # gradients of the step before are gone by now
                gauge.mark("step")
                begun = True
            gauge.mark("start")
            losses = task.loss(example)
            gauge.mark("forward")
            return losses

        def before_update(*_: object) -> None:
            nonlocal gradients
            own = [local(w.grad) for w in trained(pipeline) if w.grad is not None]
            gradients = bytes_of(own)

        optimizer.register_step_pre_hook(before_update)
        step = Stepper(
            pipeline,
            parallel.losses(pipeline, loss),
            parallel=parallel,
            processes=processes,
            optimizer=optimizer,
            clip=config.training.clip,
            skips=True,
        )
        pipeline.train()
        part = Part(0, list(range(plan.batch)), example)
        for done in (1, 2, 3):
            gc.collect()
            begun = False
            step([part] * config.training.accumulation)
            ema.update(done)
        found = classes_of(pipeline, ema, posthoc)
        found[MOMENTS] = bytes_of(moments_in(optimizer))
        found[GRADIENTS] = gradients
    kept, total = gauge.levels(found[MOMENTS])
    return {**found, KEPT: kept, "total": total}


# Reporting


def as_report(
    plan: Plan, predicted: Footprint, measured: Mapping[str, int] | None
) -> dict[str, Any]:
    """Bytes, and what they are of."""
    config = plan.config
    choices = HydraConfig.get().runtime.choices
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        "torch": torch.__version__,
        **{name: choices[name] for name in ("model", "optimizer", "parallel")},
        "parameters": {},
        "world_size": plan.world_size,
        "replicas": config.parallel.get("replicas"),
        "batch": plan.batch,
        **{name: config[name] for name in ("image_size", "activation_checkpointing")},
        "accumulation": config.training.accumulation,
        "encoders": list(config.encoders or ()),
        "device": plan.device.type,
        "precision": {torch.bfloat16: "bf16", torch.float32: "fp32"}[plan.dtype],
        "peak": predicted.peak,
        "largest": predicted.largest,
        "kept_by_forward": predicted.kept,
        "kept_by_backward": predicted.gradients,
        "total": predicted.total,
    }
    with torch.device("meta"):
        pipeline = build_pipeline(config)
    report["text_length"] = pipeline.text.context_length
    report["parameters"] = {
        name: sum(weight.numel() for weight in part.parameters())
        for name, part in pipeline.named_children()
    }
    if measured is not None:
        whole = {
            **{name: predicted.largest[name] for name in CLASSES if name != CAST},
            KEPT: predicted.kept,
            GRADIENTS: predicted.gradients,
            "total": predicted.total,
        }
        report["measured"] = {
            name: {
                "predicted": size,
                "measured": measured[name],
                "deviation": (size - measured[name]) / max(measured[name], 1),
            }
            for name, size in whole.items()
        }
    return report


def as_markdown(report: Mapping[str, Any]) -> str:
    """GB of one process, by class."""
    network = report["parameters"]["mmdit"]
    lines = [
        f"{report['protocol']}: {report['model']}, {network:,} parameters, {report['optimizer']}, "
        f"{report['parallel']} over {report['world_size']}, on {report['device']} in "
        f"{report['precision']}",
        f"each process: {report['batch']} samples of {report['image_size']} x "
        f"{report['image_size']} pixels and {report['text_length']} tokens, "
        f"activation_checkpointing={report['activation_checkpointing']}",
        "",
    ]
    rows: list[tuple[object, ...]] = [
        (name, report["peak"][name] / 1e9, report["largest"][name] / 1e9) for name in CLASSES
    ]
    rows.append(("**all**", report["total"] / 1e9, ""))
    told = "\n".join(lines) + "\n" + table(("GB of a process", "at the peak", "at most"), rows)
    if "measured" not in report:
        return told
    names = {
        KEPT: "kept by the forward pass",
        GRADIENTS: "gradients, complete",
        "total": "**all, at the peak**",
    }
    compared = [
        (
            names.get(name, name),
            row["predicted"] / 1e9,
            row["measured"] / 1e9,
            f"{100 * row['deviation']:+.1f} %",
        )
        for name, row in report["measured"].items()
    ]
    header = ("GB of a process", "predicted", "measured", "deviation")
    return told + "\n" + table(header, compared)


if __name__ == "__main__":
    store_formulations()
    launch(job, config_name="memory", verbatim=VERBATIM)
