"""A watch over sampling: it counts evaluations and stops at the first step that went wrong."""

import math
from collections import deque

import torch
from torch import Tensor

from mmdit.errors import NotFinite
from mmdit.flow.solvers import Progress

REMEMBERED = 8  # newest evaluations: more than any solver makes in a step
SUMMANDS = 2**20  # of squares, more than any norm here adds up


class Watch:
    """Looks at the latents after every step, one reduction each.

    Args:
        steps: that the solver makes, for messages.
        progress: called after each step that is in order.
    """

    def __init__(self, steps: int, progress: Progress | None = None) -> None:
        self.steps, self.progress = steps, progress
        self.evaluations = 0  # of the network, summed over the images
        self._newest: deque[tuple[Tensor, Tensor]] = deque(maxlen=REMEMBERED)

    def evaluated(self, z_t: Tensor, velocity: Tensor) -> None:
        """Note what the network made of a batch of latents."""
        self.evaluations += len(z_t)
        self._newest.append((z_t, velocity))

    def step(self, i: int, t: float, z: Tensor) -> None:
        """A solver's `progress`.

        Raises:
            NotFinite: the latents are NaN, infinite, or too large to compute with.
        """
        self.check(z, f"step {i + 1} of {self.steps} (to t = {t:.3g})")
        self._newest.clear()
        if self.progress is not None:
            self.progress(i, t, z)

    def check(self, z: Tensor, stage: str) -> None:
        """Raise NotFinite, with the cause, unless the latents can be computed with."""
        if not in_range(z):
            raise NotFinite(
                f"sampling, {stage}: the latents are NaN, infinite or too large to compute with, "
                f"because {self._cause()}"
            )

    def _cause(self) -> str:
        for given, velocity in self._newest:
            if in_range(given) and not in_range(velocity):
                return (
                    "the network's output is. Try bfloat16 or float32 instead of float16 "
                    "(dtype=torch.bfloat16, or precision=bf16 or fp32 on a command line); look for "
                    "damaged weights with verify=true; or use less guidance"
                )
        return (
            "guidance or the solver made them so: the network's output is finite. Use less "
            "guidance, more steps or another solver"
        )


def in_range(x: Tensor) -> bool:
    """Whether no value is NaN, infinite, or so large that a sum of squares, as in norms, is."""
    limit = math.sqrt(torch.finfo(x.dtype).max / SUMMANDS)
    return not x.numel() or x.abs().amax().item() < limit  # which NaN never is
