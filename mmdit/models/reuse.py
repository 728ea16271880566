"""Blocks in a view of a network that evaluates all of them only for some samples.

Together they take the place of a backbone's blocks, see `Backbone.reusing`: the first decides which
samples the others see, and the last completes the tokens of all.
"""

from typing import Any

from torch import Tensor

from mmdit.flow.cached_velocity import Residuals
from mmdit.models.blocks import Block


class DecidingBlock(Block):
    """The first block: evaluated for all samples, and passes on those that need the others."""

    def __init__(self, block: Block, residuals: Residuals) -> None:
        super().__init__()
        self.block, self.residuals = block, residuals
        self.returns = block.returns

    def forward(self, *given: Tensor) -> Any:
        changed = as_tuple(self.block(*given))
        rows = self.residuals.choose(given[self.returns[-1]], changed[-1])
        return as_returned(tuple(selected(part, rows) for part in changed))

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        return self.block.flops(image_tokens, text_tokens)


class LaterBlock(Block):
    """A later block: evaluated only for the samples that the first has chosen."""

    def __init__(self, block: Block, residuals: Residuals) -> None:
        super().__init__()
        self.block, self.residuals = block, residuals
        self.returns = block.returns

    def forward(self, *given: Tensor) -> Any:
        rows = self.residuals.rows
        given = tuple(selected(part, rows) for part in given)
        if not len(rows):
            return as_returned(tuple(given[i] for i in self.returns))
        return self.block(*given)

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        """Operations per sample, in the mean over the samples of the latest evaluation."""
        return round(self.block.flops(image_tokens, text_tokens) * self.residuals.share)


class CompletingBlock(LaterBlock):
    """The last block: its result has the tokens of all samples again."""

    def forward(self, *given: Tensor) -> Tensor:
        return self.residuals.complete(super().forward(*given))


def selected(part: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a tensor; itself, if it has no others."""
    return part if len(part) == len(rows) else part[rows]


def as_tuple(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a block returns, as a tuple."""
    return (returned,) if isinstance(returned, Tensor) else returned


def as_returned(parts: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Tokens as a block returns them: one tensor alone, or several as a tuple."""
    return parts if len(parts) > 1 else parts[0]
