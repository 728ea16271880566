"""The clipped objective of proximal policy optimization (Schulman et al. 2017, Eq. 7)."""

import torch
from torch import Tensor


def clipped(log_ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(A rho, A clip(rho, 1 - clip, 1 + clip)) with rho = exp(log_ratio).

    Args:
        log_ratio: of the policy's likelihood to that of the old policy, (b,).
        advantages: A, (b,).
        clip: how far rho may move from 1 before its gradient ends.

    Returns:
        Losses (b,), and what is logged of the ratio.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(-advantages * ratio, -advantages * bounded)
    figures = {
        "ratio": ratio,
        "log_ratio_max": log_ratio.abs().max(),
        "clip_share": ((ratio - 1).abs() > clip).float(),
    }
    return losses, {name: value.detach() for name, value in figures.items()}
