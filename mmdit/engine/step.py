"""One training step: forward, backward, agree, clip, update."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.engine.advice import setting, where_memory_ran_out, where_not_finite
from mmdit.engine.loader import Part
from mmdit.engine.parallel import Loss, Parallel, whole
from mmdit.errors import UserError
from mmdit.out_of_memory import is_out_of_memory
from mmdit.processes import Processes


class Step(NamedTuple):
    """What came of a step."""

    loss: float  # mean over the batch, over all processes
    norm: float  # of the gradient, before clipping; of the first module
    losses: Tensor  # of each sample of this process, (b,) on the CPU
    flags: list[float]  # summed over all processes
    updated: bool


class Stepper:
    """Makes steps.

    Args:
        loss: an example to the loss of each sample (b,); gradients are averaged over processes.
        parallel, processes: how and with whom.
        trained: modules, each with the optimizer of its weights.
        clip: greatest norm of the gradient of a module.
        skips: whether a step whose loss or gradient is not finite is left out instead of an error.
        section: of the config, whose keys messages name.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        parallel: Parallel,
        processes: Processes,
        trained: Sequence[tuple[nn.Module, torch.optim.Optimizer]],
        clip: float,
        skips: bool,
        section: str = "training",
    ) -> None:
        self.loss, self.parallel, self.processes = loss, parallel, processes
        self.optimizers = [optimizer for _, optimizer in trained]
        self.weights = [
            [weight for weight in module.parameters() if weight.requires_grad]
            for module, _ in trained
        ]
        self.clip, self.skips = clip, skips
        self.section = section

    def __call__(self, parts: Sequence[Part], flags: Sequence[float] = ()) -> Step:
        """Train on the parts of a step.

        Args:
            flags: of this process, to be summed over all on this occasion.

        Raises:
            UserError: the loss or the gradient is not finite, in every process if it is in one; the
                weights are as they were. Or memory ran out.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        try:
            *first, last = parts
            with self.parallel.quiet():
                losses = [self._backward(part.example, len(parts)) for part in first]
            losses.append(self._backward(last.example, len(parts)))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError(_what_needs_less(parts, self.section)) from error
            raise
        own = torch.cat(losses).float().cpu()
        # A gradient that is not finite in one process is not finite in any after the exchange, ...
        clipped = [torch.nn.utils.clip_grad_norm_(each, self.clip) for each in self.weights]
        norms = [whole(norm).item() for norm in clipped]
        # ... but a loss may be infinite and its gradient zero: all must know.
        told = torch.tensor([own.mean(), *flags], dtype=torch.float64)
        total, *summed = self.processes.total(told).tolist()
        loss = total / self.processes.world_size
        norm = next((each for each in norms if not math.isfinite(each)), norms[0])
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
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
            + f". The weights were not updated. {where_not_finite(self.section)}; or leave such "
            f"steps out with {setting(self.section, 'nonfinite', 'skip')}"
        )


def _what_needs_less(parts: Sequence[Part], section: str) -> str:
    size = len(parts[0].indices)
    halved = f"{setting(section, 'accumulation', 2 * len(parts))} (the same losses), "
    return (
        f"step {parts[0].step}: out of memory with {size} samples at a time. Try "
        f"{halved if size > 1 else ''}{where_memory_ran_out(section)}"
    )
