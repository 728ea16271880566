"""The heads of LADD's discriminator, which judge the features of the frozen teacher."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.models.mmdit import MMDiT
from mmdit.nn.norms import LayerNorm


class Head(nn.Module):
    """Scores each place of the image tokens of one block; positive is real.

    Args:
        width: of the tokens, and of the teacher's embedding of timestep and pooled text.
        channels: of the head.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.enter = nn.Conv2d(width, channels, 1)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.score = nn.Conv2d(channels, 1, 1)
        self.condition = nn.Linear(width, channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, y: Tensor, rows: int) -> Tensor:
        """Tokens (b, n, d) in `rows` rows and the embedding y (b, d) -> scores (b, n)."""
        h = rearrange(self.norm(x), "b (rows columns) d -> b d rows columns", rows=rows)
        h = self.act(self.enter(h))
        h = self.act(h + self.mix(h))
        # As in a projection discriminator: does the place look real, and as the condition asks?
        asked = (h * self.condition(y)[:, :, None, None]).mean(1)
        return (self.score(h)[:, 0] + asked).flatten(1)


class Heads(nn.Module):
    """One head after every block of the teacher (Sauer et al. 2024, Sec. 3).

    Args:
        teacher: an MM-DiT, which stays as it is.
        channels: of each head.
    """

    def __init__(self, teacher: MMDiT, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(teacher.width, channels) for _ in teacher.layers)

    def forward(self, features: Sequence[Tensor], y: Tensor, rows: int) -> Tensor:
        """Scores of all heads and places, (b, heads * n).

        Args:
            features: image tokens (b, n, d) after each block.
            y: the teacher's embedding of timestep and pooled text (b, d).
            rows: of the grid of tokens.
        """
        scored = zip(self.heads, features, strict=True)
        return torch.cat([head(x, y, rows) for head, x in scored], dim=1)
