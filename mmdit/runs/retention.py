"""Which checkpoints of a run stay."""

import dataclasses
import math
from collections.abc import Sequence

from mmdit.checks import whole_number
from mmdit.runs.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay when a new one has been written.

    Args:
        last: how many of the newest.
        every: those of steps that it divides stay for good; None is none.
        best: name of a figure of the evaluation, like 'ema/loss'; the checkpoint of its best value
            stays. None is none.
        highest: whether the best value is the highest, not the lowest.

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
        """The steps of those that stay; `checkpoints` from the oldest to the newest."""
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
