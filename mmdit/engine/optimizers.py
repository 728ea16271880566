"""Optimizers and learning-rate schedules."""

from collections.abc import Sequence

import torch
from torch import nn

from mmdit.errors import UserError


def adamw(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable weights; decay is for matrices, not for embeddings and vectors.

    Args:
        module: its parameters that require gradients are trained.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for owner in module.modules():
        for weight in owner.parameters(recurse=False):
            if weight.requires_grad:
                decayed = weight.ndim >= 2 and isinstance(owner, nn.Linear | nn.Conv2d)
                (matrices if decayed else others).append(weight)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    beta_1, beta_2 = betas
    return torch.optim.AdamW(groups, lr=lr, betas=(beta_1, beta_2), eps=eps, fused=True)


class WarmupConstant:
    """Linear warm-up to 1, then constant (Sec. B.3): the factor of the learning rate at a step.

    A pure function of the step, so that a resumed or a prolonged run sees the same rates.
    """

    def __init__(self, *, warmup_steps: int = 1000) -> None:
        if warmup_steps < 0:
            raise UserError(f"warmup_steps {warmup_steps} must not be negative")
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """Factor for the step that is about to be made, counted from 0."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


def set_lr(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Give each parameter group its rate."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
