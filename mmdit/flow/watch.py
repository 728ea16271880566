"""Monitors sampling: counts evaluations and stops at the first step with invalid latents."""

import math
from collections import deque

import torch
from torch import Tensor

from mmdit.errors import NotFinite
from mmdit.flow.solvers import Progress

REMEMBERED = 8  # latest evaluations kept: more than any solver makes in a step
SUMMANDS = 2**20  # more squares than any norm here sums


class Watch:
    """Checks the latents after every step, at the cost of one reduction.

    Args:
        steps: number of solver steps, for messages.
        progress: called after each step with valid latents.
        cached: whether some velocities come from a cache, for messages.
    """

    def __init__(
        self, steps: int, progress: Progress | None = None, *, cached: bool = False
    ) -> None:
        self.steps, self.progress, self.cached = steps, progress, cached
        self.evaluations = 0.0  # of the network, summed over the images
        self._newest: deque[tuple[Tensor, Tensor]] = deque(maxlen=REMEMBERED)

    def evaluated(self, z_t: Tensor, velocity: Tensor, share: float = 1.0) -> None:
        """Record the network's output for a batch of latents.

        Args:
            share: of the operations of the whole network, where some blocks were not evaluated.
        """
        self.evaluations += len(z_t) * share
        self._newest.append((z_t, velocity))

    def step(self, i: int, t: float, z: Tensor) -> None:
        """Check the latents after a step; passed to solvers as `progress`.

        Raises:
            NotFinite: the latents are NaN, infinite, or too large to compute with.
        """
        self.check(z, f"step {i + 1} of {self.steps} (to t = {t:.3g})")
        self._newest.clear()
        if self.progress is not None:
            self.progress(i, t, z)

    def check(self, z: Tensor, stage: str) -> None:
        """Raise NotFinite, with the likely cause, if a latent is not `in_range`."""
        if not in_range(z):
            raise NotFinite(
                f"sampling, {stage}: the latents are NaN, infinite or too large to compute with, "
                f"because {self._cause()}"  # the cause is a full sentence with advice
            )

    def _cause(self) -> str:
        for given, velocity in self._newest:
            if in_range(given) and not in_range(velocity):
                return (
                    "the network's output is. Try bfloat16 or float32 instead of float16 "
                    "(dtype=torch.bfloat16, or precision=bf16 or fp32 on a command line); check "
                    "for damaged weights with verify=true; or use less guidance"
                )
        if self.cached:
            return (
                "of the cache, guidance or the solver: the network's output is finite. Sample "
                "without the cache, or use less guidance, more steps or another solver"
            )
        return (
            "of guidance or the solver: the network's output is finite. Use less guidance, more "
            "steps or another solver"
        )


def in_range(x: Tensor) -> bool:
    """Whether all values are finite and small enough that sums of squares, as in norms, are too."""
    limit = math.sqrt(torch.finfo(x.dtype).max / SUMMANDS)
    return not x.numel() or x.abs().amax().item() < limit  # false for NaN
