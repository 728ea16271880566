"""The order of training samples: a pure function of (seed, position), with no state to save."""

import bisect
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike

from mmdit.checks import whole_number
from mmdit.keys import generator_for

Order: TypeAlias = Callable[[int, int], list[int]]  # (start, count) -> sample indices


class ShuffledOrder:
    """Every index in [0, size) once per epoch, in a new order each epoch.

    Args:
        size: number of samples.
        seed: seed of the shuffling.
        stream: distinguishes several orders of one seed.
    """

    def __init__(self, *, size: int, seed: int, stream: str = "order") -> None:
        whole_number("size", size)
        self.size, self.seed, self.stream = size, seed, stream
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def __call__(self, start: int, count: int) -> list[int]:
        """Sample indices at global positions start, ..., start + count - 1."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = generator_for(self.seed, self.stream, epoch)
            self._permutation = torch.randperm(self.size, generator=generator)
            self._epoch = epoch
        return int(self._permutation[offset])


class BucketedOrder:
    """Batches of one group each, in which all samples occur equally often in the long run.

    Each group is an endless stream of its samples, reshuffled on every pass. Epoch e consists of
    the full batches that end between pass e and pass e + 1 of each stream, shuffled. Samples that
    do not fill a batch are carried over to the next epoch, so none is dropped or preferred, and
    fewer than `batch_size` samples of a group are carried over at any time.

    `order(start, count)` takes global positions, as `ShuffledOrder` does: batch g starts at
    g * batch_size. So it is the same batch however it is split over processes and accumulation
    steps.

    Args:
        group_of: the group of each sample, (n,), as an index into `groups`.
        groups: names of the groups; they may be empty.
        batch_size: global batch size. A smaller group repeats samples within a batch.
        seed: seed of the shuffling.
    """

    def __init__(
        self, *, group_of: ArrayLike, groups: Sequence[str], batch_size: int, seed: int
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        whole_number("batch_size", batch_size)
        indices = np.asarray(group_of)
        whole_number("size", indices.size)
        members = {name: np.flatnonzero(indices == i) for i, name in enumerate(groups)}
        self._members = {name: found for name, found in members.items() if len(found)}
        self._streams = {
            name: ShuffledOrder(size=len(found), seed=seed, stream=f"group {name}")
            for name, found in self._members.items()
        }
        self._epoch, self._batches = -1, list[tuple[str, int]]()

    def __call__(self, start: int, count: int) -> list[int]:
        """Sample indices at global positions start, ..., start + count - 1."""
        found: list[int] = []
        while count > 0:
            batch, offset = divmod(start, self.batch_size)
            size = min(count, self.batch_size - offset)
            name, number = self._batch(batch)
            within = self._streams[name](number * self.batch_size + offset, size)
            found += self._members[name][within].tolist()
            start, count = start + size, count - size
        return found

    def group(self, batch: int) -> str:
        """The name of the group of global batch `batch`."""
        return self._batch(batch)[0]

    def _batch(self, batch: int) -> tuple[str, int]:
        """The group of a global batch, and the number of the batch in the group's stream."""
        # An upper bound on the epoch: batches are at most one epoch's worth late.
        most = (batch + len(self._members) + 1) * self.batch_size // self._size + 2
        epoch = bisect.bisect_right(range(most), batch, key=self._begin) - 1
        if epoch != self._epoch:
            self._batches = [
                (name, number)
                for name in self._members
                for number in range(self._done(name, epoch), self._done(name, epoch + 1))
            ]
            self._epoch = epoch
            generator = generator_for(self.seed, "batches", epoch)
            shuffled = torch.randperm(len(self._batches), generator=generator).tolist()
            self._batches = [self._batches[i] for i in shuffled]
        return self._batches[batch - self._begin(epoch)]

    @property
    def _size(self) -> int:
        return sum(map(len, self._members.values()))

    def _done(self, name: str, epochs: int) -> int:
        """The number of full batches of a group after a number of passes."""
        return epochs * len(self._members[name]) // self.batch_size

    def _begin(self, epoch: int) -> int:
        """The number of batches of all groups before an epoch."""
        return sum(self._done(name, epoch) for name in self._members)
