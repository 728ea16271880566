"""The order of training samples: a pure function of (seed, position), with no state to save."""

import torch

from mmdit.errors import UserError
from mmdit.keys import generator_for


class ShuffledOrder:
    """Every index in [0, size) once per epoch, each epoch in an order of its own.

    Args:
        size: number of samples.
        seed: of the shuffling.
    """

    def __init__(self, *, size: int, seed: int) -> None:
        if size < 1:
            raise UserError(f"size {size} must be at least 1")
        self.size, self.seed = size, seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def __call__(self, start: int, count: int) -> list[int]:
        """Sample indices at global positions start, ..., start + count - 1."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = generator_for(self.seed, "order", epoch)
            self._permutation = torch.randperm(self.size, generator=generator)
            self._epoch = epoch
        return int(self._permutation[offset])
