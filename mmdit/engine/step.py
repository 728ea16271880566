"""One training step: forward, backward, agree, clip, update."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.engine.loader import Part
from mmdit.engine.parallel import Loss, Parallel, whole
from mmdit.engine.processes import Processes
from mmdit.errors import UserError


class Step(NamedTuple):
    """What came of a step."""

    loss: float  # mean over the batch, over all processes
    norm: float  # of the gradient, before clipping
    losses: Tensor  # of each sample of this process, (b,) on the CPU
    flags: list[float]  # summed over all processes
    updated: bool


class Stepper:
    """Makes steps.

    Args:
        module: what is trained.
        loss: an example to the loss of each sample (b,); gradients are averaged over processes.
        parallel, processes: how and with whom.
        optimizer: of the weights of `module`.
        clip: greatest norm of the gradient.
        skips: whether a step whose loss or gradient is not finite is left out instead of an error.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        *,
        parallel: Parallel,
        processes: Processes,
        optimizer: torch.optim.Optimizer,
        clip: float,
        skips: bool,
    ) -> None:
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.loss, self.parallel, self.processes = loss, parallel, processes
        self.optimizer, self.clip, self.skips = optimizer, clip, skips

    def __call__(self, parts: Sequence[Part], flags: Sequence[float] = ()) -> Step:
        """Train on the parts of a step.

        Args:
            flags: of this process, to be summed over all on this occasion.

        Raises:
            UserError: the loss or the gradient is not finite, in every process if it is in one; the
                weights are as they were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        *first, last = parts
        with self.parallel.quiet():
            losses = [self._backward(part.example, len(parts)) for part in first]
        losses.append(self._backward(last.example, len(parts)))
        own = torch.cat(losses).float().cpu()
        # A gradient that is not finite in one process is not finite in any after the exchange, ...
        norm = whole(torch.nn.utils.clip_grad_norm_(self.weights, self.clip)).item()
        # ... but a loss may be infinite and its gradient zero: all must know.
        told = torch.tensor([own.mean(), *flags], dtype=torch.float64)
        total, *summed = self.processes.total(told).tolist()
        loss = total / self.processes.world_size
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.optimizer.step()
        elif not self.skips:
            raise UserError(self._complaint(parts, own, loss, norm))
        return Step(loss, norm, own, summed, finite)

    def _backward(self, example: Any, parts: int) -> Tensor:
        losses = self.loss(example)
        (losses.mean() / parts).backward()
        return losses.detach()

    def _complaint(self, parts: Sequence[Part], losses: Tensor, loss: float, norm: float) -> str:
        indices = [index for part in parts for index in part.indices]
        pairs = zip(indices, losses.tolist(), strict=True)
        own = [index for index, value in pairs if not math.isfinite(value)]
        bad = [index for found in self.processes.gather(own) for index in found]
        return (
            f"step {parts[0].step}: the loss is {loss} and the gradient norm {norm}"
            + (f"; not finite for samples {bad[:10]}" if bad else "")
            + ". The weights were not updated: lower optimizer.lr, and go on from the last "
            "checkpoint with resume=auto, or leave such steps out with training.nonfinite=skip"
        )
