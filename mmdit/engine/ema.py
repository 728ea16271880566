"""Exponential moving averages of a module's weights, in float32.

A profile says how long an average remembers, as a pure function of the step; so the step and the
average are all that a resumed run needs.
"""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmdit.checks import number, whole_number
from mmdit.dtypes import wide
from mmdit.errors import UserError

M = TypeVar("M", bound=nn.Module)


class Profile(ABC):
    """How much an average keeps of itself when new weights come in."""

    every: int = 1  # steps between two updates

    @abstractmethod
    def decay(self, step: int) -> float:
        """Share that stays when the weights after `step` steps come in; `step` from 1."""


class ConstantDecay(Profile):
    """The paper's: every 100 batches with decay 0.99 (App. B.3).

    Early on, when n updates have been seen, the decay is (1 + n) / (10 + n), so that the random
    start is soon forgotten.

    Args:
        decay: of one update, in [0, 1).
        every: steps between two updates.
    """

    def __init__(self, *, decay: float, every: int) -> None:
        number("decay", decay, 0, below=1)
        whole_number("every", every, 1)
        self.limit, self.every = decay, every

    def decay(self, step: int) -> float:
        updates = step // self.every
        return min(self.limit, (1 + updates) / (10 + updates))


class Following(Profile):
    """The old policy of DiffusionNFT (Zheng et al. 2025), which follows ever more slowly.

    After n updates it keeps min(rate n, most) of itself. With most=0 it is the newest weights
    themselves, every time: the policy that sampled, for algorithms that need that one.

    Args:
        rate: growth of what it keeps with each update, at least 0.
        most: greatest share that it keeps, in [0, 1).
        every: steps between two updates: those of a round.
    """

    def __init__(self, *, rate: float, most: float, every: int) -> None:
        self.rate = number("ema.rate", rate, 0)
        self.most = number("ema.most", most, 0, below=1)
        self.every = whole_number("ema.every", every, 1)

    def decay(self, step: int) -> float:
        return min(self.rate * (step // self.every), self.most)


class HalfLife(Profile):
    """Weights count half as much after every `half_life` samples, whatever the batch size.

    Args:
        half_life: in samples.
        batch_size: samples of one step; with 1, `half_life` is in steps.
        ramp_up: greatest half-life as a share of the samples seen, as in EDM (Karras et al. 2022),
            so that the random start is soon forgotten; None is no limit.
    """

    def __init__(
        self, *, half_life: float, batch_size: int = 1, ramp_up: float | None = None
    ) -> None:
        number("half_life", half_life, above=0)
        whole_number("batch_size", batch_size, 1)
        if ramp_up is not None:
            number("ramp_up", ramp_up, above=0)
        self.half_life, self.batch_size, self.ramp_up = half_life, batch_size, ramp_up

    def decay(self, step: int) -> float:
        half_life = self.half_life
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * step * self.batch_size)
        return 0.5 ** (self.batch_size / half_life)


class PowerFunction(Profile):
    """Weights after step tau count as tau^gamma: memory that grows with the run (EDM2, Sec. 3.1).

    The first update replaces the random start altogether.

    Args:
        sigma_rel: standard deviation of the profile, relative to the length of the run; between 0
            and 12^-1/2 = 0.2887, the plain mean of all steps. The paper's are 0.05 and 0.10.
    """

    def __init__(self, *, sigma_rel: float) -> None:
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def decay(self, step: int) -> float:  # Eq. 127
        return (1 - 1 / step) ** (self.gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the power function of relative standard deviation `sigma_rel`.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic equation in gamma, whose
    greatest root is meant (Karras et al. 2024, Sec. C.1).

    Raises:
        UserError: no gamma >= 0 has it.
    """
    number("sigma_rel", sigma_rel)
    if not 0.0 < sigma_rel <= 12**-0.5:
        raise UserError(f"sigma_rel {sigma_rel} must lie in (0, 0.2887]: 12^-1/2 is a plain mean")
    s = float(sigma_rel) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return max(0.0, float(roots.real.max()))


class EMA(Generic[M]):
    """A shadow of the trainable weights of `module`.

    What is not trained is shared with `module`, not copied: a frozen T5 is large, and what is
    loaded into one is loaded into both. Buffers of parts that are trained stay as copied.

    Args:
        module: what is trained.
        profile: how long the average remembers.

    Attributes:
        module: the shadow.
        shared: keys, in the state dict of either module, of what belongs to both.
    """

    def __init__(self, module: M, *, profile: Profile) -> None:
        self.profile = profile
        shared = {id(tensor) for tensor in frozen(module)}
        self.shared = frozenset(key for key, tensor in _named(module) if id(tensor) in shared)
        self.module = copied(module)
        self._trained = module
        for average, weight in zip(self.module.parameters(), module.parameters(), strict=True):
            if weight.requires_grad:
                average.data = wide(average.data)

    @functools.cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Averages and weights, found after both may have been spread over processes."""
        both = zip(self.module.parameters(), self._trained.parameters(), strict=True)
        return [(average, weight) for average, weight in both if weight.requires_grad]

    def update(self, step: int) -> None:
        """Take in the weights after `step` steps have been made."""
        if step % self.profile.every == 0:
            averages, weights = zip(*self._pairs, strict=True)
            take_in(averages, weights, self.profile.decay(step))


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers by their keys; one that has two keys comes twice."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def copied(module: M) -> M:
    """A copy of a module that is not trained; it shares what is not trained in the module."""
    shared = {id(tensor): tensor for tensor in frozen(module)}
    return copy.deepcopy(module, shared).eval().requires_grad_(False)


def frozen(module: nn.Module) -> Iterator[Tensor]:
    """Weights that are not trained, with the buffers of parts in which no weight is."""
    trained = [weight.requires_grad for weight in module.parameters()]
    if trained and not any(trained):
        yield from (*module.parameters(), *module.buffers())
    else:
        own = module.parameters(recurse=False)
        yield from (weight for weight in own if not weight.requires_grad)
        for part in module.children():
            yield from frozen(part)


def local(tensor: Tensor) -> Tensor:
    """The share of a tensor that this process holds, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def take_in(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Move averages, float32 at least, to `decay` of themselves and 1 - `decay` of the weights."""
    own = [local(average) for average in averages]
    torch._foreach_lerp_(own, [wide(local(weight)) for weight in weights], 1 - decay)
