"""Which checkpoints of a run are kept."""

import dataclasses
import math
from collections.abc import Sequence

from mmdit.checks import whole_number
from mmdit.runs.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept when a new one has been written; the rest are deleted.

    Args:
        last: how many of the newest to keep.
        every: keep those at multiples of this many steps permanently; None keeps none.
        best: name of a validation metric, like 'ema/loss': keep the checkpoint with its best
            value. None keeps none.
        highest: whether the highest value is the best, rather than the lowest.

    Raises:
        UserError: a number is not whole and above 0.
    """

    last: int = 2
    every: int | None = None
    best: str | None = None
    highest: bool = False

    def __post_init__(self) -> None:
        for name, value in (("keep", self.last), ("keep_every", self.every)):
            if value is not None or name == "keep":
                whole_number(name, value)

    def kept(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        """Steps of the checkpoints to keep; `checkpoints` are sorted, the oldest first."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-self.last :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        sign = -1 if self.highest else 1
        ranked = [
            (sign * checkpoint.metrics[self.best], checkpoint.step)
            for checkpoint in checkpoints
            if self.best is not None and math.isfinite(checkpoint.metrics.get(self.best, math.nan))
        ]
        return kept | {step for _, step in sorted(ranked)[:1]}
