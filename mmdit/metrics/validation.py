"""The paper's validation loss: at 8 equally spaced levels of t, with fixed noise (Sec. 5.1)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmdit.flow.objective import Draw
from mmdit.keys import generator_for
from mmdit.pipeline import Pipeline

LEVELS = [(i + 1) / 8 for i in range(8)]


@torch.no_grad()
def validation_loss(
    pipeline: Pipeline,
    latents: Tensor,
    captions: Sequence[str],
    *,
    seed: int,
    extra: Mapping[str, Tensor] = {},
    batch_size: int = 64,
) -> list[float]:
    """Mean loss at each t of `LEVELS`, without dropping text encoders.

    The noise of a sample is keyed by (seed, index) and the same at every level and evaluation, so
    two evaluations differ only by the weights. The paper reports the mean of the first seven,
    since the input at t = 1 is pure noise.

    Args:
        pipeline: the pipeline with the network and its objective.
        latents: normalized latents (n, c, h, w).
        captions: their n captions.
        seed: seed of the noise.
        extra: what the network reads besides text (`Condition.extra`), n rows each.
        batch_size: number of samples per batch; it only affects rounding.
    """
    shape, device = tuple(latents.shape[1:]), latents.device
    losses: list[list[Tensor]] = [[] for _ in LEVELS]
    for start in range(0, len(latents), batch_size):
        x_0 = latents[start : start + batch_size]
        keys = range(start, start + len(x_0))
        noises = [torch.randn(shape, generator=generator_for(seed, "validation", i)) for i in keys]
        epsilon = torch.stack(noises).to(device)
        rows = slice(start, start + batch_size)
        condition = pipeline.text.encode(captions[rows])
        condition = condition._replace(extra={name: part[rows] for name, part in extra.items()})
        for found, level in zip(losses, LEVELS, strict=True):
            draw = Draw(torch.full((len(x_0),), level, device=device), epsilon)
            found.append(pipeline.objective(pipeline.mmdit, x_0, condition, draw))
    return [torch.cat(found).mean().item() for found in losses]
