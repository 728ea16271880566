"""How the images of a round are sampled: by an ODE, or by steps whose densities are known."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmdit.alignment.rollouts import Trajectory
from mmdit.checks import MOST_STEPS, number, whole_number
from mmdit.errors import UserError
from mmdit.flow import transitions
from mmdit.flow.condition import Condition
from mmdit.flow.guidance import ClassifierFreeGuidance
from mmdit.flow.solvers import Solver, stochastic
from mmdit.nn.attention import as_in_training
from mmdit.pipeline import Pipeline


class Sampled(NamedTuple):
    """Latents, and how they came about where the steps were random."""

    x_0: Tensor  # (b, c, h, w)
    trajectory: Trajectory | None = None


class Sampler(Protocol):
    """Samples latents.

    Attributes:
        steps: of the solver.
    """

    steps: int

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance; 1 is none."""

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image."""

    def __call__(self, pipe: Pipeline, noise: Tensor, positive: Condition) -> Sampled:
        """Latents from noise (b, c, h, w), with the conditions of b prompts."""


class ODESampler:
    """Deterministic sampling, for algorithms that need the images alone.

    Args:
        solver: from `mmdit.flow.solvers`.
        steps: of the solver.
        guidance: scale of classifier-free guidance; 1 is none.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, *, solver: Solver, steps: int = 10, guidance: float = 1.0) -> None:
        self.solver = solver
        self.steps = whole_number("sampler.steps", steps, most=MOST_STEPS)
        self.guidance = number("sampler.guidance", guidance)

    @property
    def evaluations(self) -> int:
        return self.steps * (1 if self.guidance == 1.0 else 2)

    def __call__(self, pipe: Pipeline, noise: Tensor, positive: Condition) -> Sampled:
        return Sampled(denoised(pipe, noise, positive, self.solver, self.steps, self.guidance))


class SDESampler:
    """Stochastic sampling, whose steps and their log-probabilities are recorded.

    Args:
        transition: the distribution of a step.
        window: first and last of the random steps, from 0; the others are Euler's. None is all but
            the last, which has no noise.
        steps, guidance: as in `ODESampler`.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        *,
        transition: transitions.Transition,
        window: Sequence[int] | None = None,
        steps: int = 10,
        guidance: float = 1.0,
    ) -> None:
        self.transition = transition
        self.steps = whole_number("sampler.steps", steps, 2, MOST_STEPS)
        self.guidance = number("sampler.guidance", guidance)
        last = self.steps - 2  # the step to t = 0 is deterministic
        self.window = (0, last) if window is None else tuple(window)
        if len(self.window) != 2 or not 0 <= self.window[0] <= self.window[1] <= last:
            raise UserError(
                f"sampler.window={window} must be the first and last random step, from 0 to {last}:"
                f" the last of sampler.steps={self.steps} has no noise"
            )

    @property
    def evaluations(self) -> int:
        return self.steps * (1 if self.guidance == 1.0 else 2)

    def __call__(self, pipe: Pipeline, noise: Tensor, positive: Condition) -> Sampled:
        made = transitions.Trajectory()
        solver = partial(
            stochastic, transition=self.transition, window=self.window, trajectory=made
        )
        with as_in_training():  # log-probabilities are compared with those of the trained model
            x_0 = denoised(pipe, noise, positive, solver, self.steps, self.guidance)
        first, last = self.window
        states = torch.stack(made.states[first : last + 2], 1)
        log_prob = torch.stack([made.log_probs[i] for i in range(first, last + 1)], 1)
        times = pipe.objective.times(self.steps)[first : last + 2]
        return Sampled(x_0, Trajectory(states.cpu(), times, log_prob.cpu()))


def denoised(
    pipe: Pipeline,
    noise: Tensor,
    positive: Condition,
    solver: Solver,
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents from noise (b, c, h, w)."""
    times = pipe.objective.times(steps)
    guide = ClassifierFreeGuidance(scale=guidance)
    negative = None
    if guide.reads_negative:
        negative = pipe.encode([""]).map(lambda part: part.expand(len(noise), *part.shape[1:]))
    z = times[0].item() * noise
    return pipe.denoise(z, times, positive, negative, guidance=guide, solver=solver).latents
