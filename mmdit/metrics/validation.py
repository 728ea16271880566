"""The paper's validation loss: at 8 equally spaced levels of t, with fixed noise (Sec. 5.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit.flow.objective import Draw
from mmdit.keys import generator_for
from mmdit.pipeline import Pipeline

LEVELS = [(i + 1) / 8 for i in range(8)]


@torch.no_grad()
def validation_loss(
    pipeline: Pipeline, latents: Tensor, captions: Sequence[str], *, seed: int
) -> list[float]:
    """Mean loss at each t of `LEVELS`, all encoders speaking.

    The noise of a sample is keyed by (seed, its index), the same at every level and evaluation, so
    that two evaluations differ by the weights only. The paper reports the mean of the first seven:
    at t = 1 there is nothing but noise.

    Args:
        latents: normalized, (n, c, h, w).
        captions: n of them.
    """
    generators = [generator_for(seed, "validation", i) for i in range(len(latents))]
    shape = tuple(latents.shape[1:])
    epsilon = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(latents.device)
    c_vec, c_ctxt = pipeline.text.encode(captions)
    losses = []
    for level in LEVELS:
        t = torch.full((len(latents),), level, device=latents.device)
        draw = Draw(t, epsilon)
        loss = pipeline.objective(pipeline.mmdit, latents, c_vec, c_ctxt, draw)
        losses.append(loss.mean().item())
    return losses
