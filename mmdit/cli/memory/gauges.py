"""Measures the memory of real steps, with CUDA's allocator, or the profiler on the CPU."""

import gc
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from mmdit.cli.build import build
from mmdit.cli.memory.plan import Plan, example_of, task_of
from mmdit.cli.memory.prediction import MOMENTS, classes_of, moments_in, trained
from mmdit.engine.ema import local
from mmdit.engine.footprint import (
    GRADIENTS,
    KEPT,
    bytes_of,
)
from mmdit.engine.loader import Part
from mmdit.engine.step import Stepper
from mmdit.engine.tasks import Captioned
from mmdit.precision import autocast
from mmdit.processes import Processes


class Gauge(Protocol):
    """A measurement of allocated memory."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def mark(self, name: str) -> None:
        """Mark a moment: a new `step`, the `start` of a forward pass, or its end, `forward`."""

    def levels(self, moments: int) -> tuple[int, int]:
        """Bytes kept by the forward pass of the last step, and all bytes at its peak.

        Args:
            moments: bytes that the optimizer allocated in the first step and kept.
        """


class CUDAGauge:
    """Memory by the statistics of CUDA's allocator."""

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
    """Memory by the allocations and frees that the CPU's allocator reports to the profiler.

    It does not report what threads of gloo free. The last step is therefore measured relative to
    its start, and constant memory before the first exchange.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Self:
        gc.collect()  # memory freed later would count as negative
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
    """Bytes of this process in real steps: by class, kept by the forward pass, and at the peak."""
    config, device = plan.config, plan.device
    precision = autocast(device, config.precision)
    gauge: Gauge = CUDAGauge(device) if device.type == "cuda" else CPUGauge()
    with gauge:
        state, parallel = parts = build(config, device, plan.dtype)
        pipeline = parts.pipeline
        task, example = task_of(plan, pipeline, precision), example_of(plan, pipeline)
        gradients, begun = 0, False

        def loss(example: Captioned) -> Tensor:
            nonlocal begun
            if not begun:  # gradients of the previous step have been freed by now
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

        state.optimizer.register_step_pre_hook(before_update)
        step = Stepper(
            parallel.losses(state.whole, loss),
            parallel=parallel,
            processes=processes,
            trained=state.trained,
            clip=config.training.clip,
            skips=True,
        )
        pipeline.train()
        part = Part(0, list(range(plan.batch)), example)
        for done in (1, 2, 3):
            gc.collect()
            begun = False
            step([part] * config.training.accumulation)
            state.ema.update(done)
        found = classes_of(pipeline, state.ema, state.posthoc)
        found[MOMENTS] = bytes_of(moments_in(state.optimizer))
        found[GRADIENTS] = gradients
    kept, total = gauge.levels(found[MOMENTS])
    return {**found, KEPT: kept, "total": total}
