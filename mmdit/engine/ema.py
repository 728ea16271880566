"""Exponential moving average of a module's weights, in float32."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from mmdit.errors import UserError

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A shadow of the trainable weights of `module`; buffers and frozen weights stay as copied.

    The paper averages every 100 batches with decay 0.99 (Sec. B.3). Early on, when few updates
    have been seen, the decay is (1 + n) / (10 + n), so that the random start is soon forgotten.

    Args:
        module: what is trained.
        decay: of one update, in [0, 1).
        every: steps between two updates.
    """

    def __init__(self, module: M, *, decay: float, every: int) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"ema.decay {decay} must lie in [0, 1)")
        if every < 1:
            raise UserError(f"ema.every {every} must be at least 1")
        self.decay, self.every = decay, every
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._pairs = [
            (average, weight)
            for average, weight in zip(self.module.parameters(), module.parameters(), strict=True)
            if weight.requires_grad
        ]
        for average, _ in self._pairs:
            average.data = average.data.float()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps have been made."""
        if step % self.every:
            return
        updates = step // self.every
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages: list[Tensor] = [average for average, _ in self._pairs]
        weights = [weight.float() for _, weight in self._pairs]
        torch._foreach_lerp_(averages, weights, 1 - decay)
