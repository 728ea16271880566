"""Networks small enough for tests, and what they take."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.models.backbone import Backbone

SIZES: dict[str, Any] = {
    "depth": 3,
    "width": 32,
    "num_heads": 2,
    "latent_channels": 4,
    "context_width": 12,
    "pooled_width": 10,
    "position_size": 6,
    "position_grid": 4,
    "position_base": 4,
}


class Tiny(NamedTuple):
    """Builds a backbone of `SIZES`, as far as its class takes them: `Tiny(DiT)(depth=2)`."""

    cls: type[Backbone]
    own: Mapping[str, Any] = {}  # arguments that others do not have

    def __call__(self, **changes: Any) -> Backbone:
        given = {**SIZES, "mlp_ratio": 2.0, **self.own}
        return self.cls(**{k: v for k, v in given.items() if self.takes(k)} | changes)

    def normed(self) -> Backbone:
        """With QK-norm, where the architecture has it."""
        return self(qk_norm=True) if self.takes("qk_norm") else self()

    def takes(self, argument: str) -> bool:
        """Whether the architecture has this argument."""
        return argument in inspect.signature(self.cls).parameters


def inputs(
    batch: int = 2, height: int = 6, width: int = 4, text_length: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, time, pooled text and text tokens for a network of `SIZES`."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 4, height, width, generator=generator),
        torch.linspace(0.2, 0.9, batch),
        torch.randn(batch, 10, generator=generator),
        torch.randn(batch, text_length, 12, generator=generator),
    )
