"""Several data sets as one, each sample from one of them in fixed shares."""

import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import torch

from mmdit.checks import expect, mapping, number
from mmdit.data.buckets import Size
from mmdit.data.caption_sources import Captions
from mmdit.data.dataset import Batch, CacheableData
from mmdit.data.drawing import Image
from mmdit.data.order import Order
from mmdit.errors import UserError
from mmdit.keys import generator_for

LONGEST_BLOCK = 10_000  # positions in which the shares hold exactly
T = TypeVar("T")


class Place(NamedTuple):
    """Where a sample of a mixture is."""

    part: str
    number: int  # its index in the part


class MixedOrder:
    """Positions are dealt to parts in blocks, in which every part gets exactly its count.

    Within a block they are shuffled. So the part of a position, and how many samples of that part
    came before, follow from the position alone; each part keeps its own order.

    An index is that of the mixture plus `size` for every pass through its part: a sample that comes
    twice in a batch is counted twice, and so gets noise of its own.

    Args:
        orders: sample indices of each part by position.
        sizes: number of samples of each part.
        counts: positions of each part in a block.
        seed: seed of the shuffling.
    """

    def __init__(
        self, *, orders: Sequence[Order], sizes: Sequence[int], counts: Sequence[int], seed: int
    ) -> None:
        self.orders, self.sizes, self.counts, self.seed = orders, sizes, counts, seed
        self._sorted = torch.tensor([part for part, n in enumerate(counts) for _ in range(n)])
        self._block, self._dealt = -1, list[int]()

    def __call__(self, start: int, count: int) -> list[int]:
        """Sample indices at global positions start, ..., start + count - 1."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> int:
        block, offset = divmod(position, len(self._sorted))
        if block != self._block:
            generator = generator_for(self.seed, "mixture", block)
            shuffled = torch.randperm(len(self._sorted), generator=generator)
            self._block, self._dealt = block, self._sorted[shuffled].tolist()
        part = self._dealt[offset]
        before = block * self.counts[part] + self._dealt[:offset].count(part)
        (index,) = self.orders[part](before, 1)
        # A part that is a mixture itself counts passes in its indices, too.
        size = self.sizes[part]
        passes = before // size + index // size
        return sum(self.sizes[:part]) + index % size + passes * sum(self.sizes)


class Mixture:
    """Several data sets, each sample from one of them in fixed shares.

    Its samples are those of the parts, one part after another. Which part each position of the
    training order comes from is keyed by (seed, position), whatever the batch size or the number
    of processes. What a step sees of a sample is decided by its part. Validation images and prompts
    are those of the first part.

    A part whose loss should count twice gets twice the share.

    Example:
        Mixture(parts={"old": shapes, "new": photos}, shares={"old": 0.7, "new": 0.3})

    Args:
        parts: name -> data set; all images have one size.
        shares: name -> relative frequency, to three digits. With 0 a part is not trained on; as the
            first it is still what is validated on.

    Raises:
        UserError: a share is negative, all are 0, a part is empty, or sizes differ.
    """

    name = "images"

    def __init__(self, *, parts: Mapping[str, CacheableData], shares: Mapping[str, float]) -> None:
        mapping("data.parts", parts)
        mapping("data.shares", shares)
        self.parts, self.shares = dict(parts), dict(shares)
        expect(bool(self.parts), "data.parts", self.parts, "must name at least one data set")
        names, shared = list(self.parts), list(self.shares)
        expect(
            set(names) == set(shared),
            "data.shares",
            shared,
            f"must name the parts {names}, each once",
        )
        self._counts = counts_of({name: self.shares[name] for name in names})
        self._size = one_size(self.parts)
        self._sizes = {name: len(part) for name, part in self.parts.items()}

    def view(self, split: str) -> "Mixture":
        """Another split: of 'train' all parts, of any other the first part alone."""
        views = {name: part.view(split) for name, part in self.parts.items()}
        if split == "train":
            return Mixture(parts=views, shares=self.shares)
        first = next(iter(views))
        return Mixture(parts={first: views[first]}, shares={first: 1})

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def place(self, index: int) -> Place:
        """The part of a sample, and its index there; indices of later passes are sample + len."""
        index %= len(self)
        for name, size in self._sizes.items():
            if index < size:
                return Place(name, index)
            index -= size
        raise AssertionError("an index below the sum of the sizes lies in a part")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of captions of all parts, sorted."""
        return tuple(sorted({kind for part in self.parts.values() for kind in part.kinds}))

    def size_of(self, index: int) -> Size:
        """Height and width of every image."""
        del index
        return self._size

    def batch(self, indices: Sequence[int], step: int = 0) -> Batch:
        """A batch of samples as step `step` sees them.

        Raises:
            UserError: the parts differ in what else comes with an image.
        """
        places = map(self.place, indices)
        return joined([self.parts[name].batch([index], step) for name, index in places])

    def square(self, indices: Sequence[int]) -> Batch:
        """A batch centre-cropped to S x S, independent of the step."""
        places = map(self.place, indices)
        return joined([self.parts[name].square([index]) for name, index in places])

    def order(self, *, batch_size: int, seed: int) -> MixedOrder:
        """The training order, which does not depend on the batch size."""
        del batch_size
        return MixedOrder(
            orders=[part.order(batch_size=1, seed=seed) for part in self.parts.values()],
            sizes=list(self._sizes.values()),
            counts=self._counts,
            seed=seed,
        )

    def cacheable(self, index: int) -> tuple[Image, Captions]:
        """The image, identical at every step, and all its captions.

        Raises:
            UserError: a part has images that change; it is named.
        """
        name, index = self.place(index)
        return self._unchanging[name].cacheable(index)

    def pick(self, captions: Mapping[str, Sequence[T]], index: int, step: int) -> T:
        """The one of a sample's captions that step `step` sees."""
        name, index = self.place(index)
        return self.parts[name].pick(captions, index, step)

    def identity(self) -> dict[str, Any]:
        """Plain data that determines `cacheable`: that of each part, in their order."""
        return {str(i): part.identity() for i, part in enumerate(self._unchanging.values())}

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of each part; empty if the config alone determines all images."""
        found = {name: part.fingerprint() for name, part in self.parts.items()}
        return found if any(found.values()) else {}

    def prompts(self) -> list[str]:
        """Those of the first part."""
        return next(iter(self.parts.values())).prompts()

    @functools.cached_property
    def _unchanging(self) -> dict[str, CacheableData]:
        """The parts, once the images of each are known to be the same at every step."""
        for name, part in self.parts.items():
            try:
                part.cacheable(0)
            except UserError as error:
                raise UserError(f"part {name} of the mixture: {error}") from error
        return self.parts


def counts_of(shares: Mapping[str, float]) -> list[int]:
    """The smallest whole numbers in the ratio of `shares`: {old: 0.7, new: 0.3} gives [7, 3].

    Raises:
        UserError: a share is negative, all are 0, or they have too many digits.
    """
    exact = []
    for name, share in shares.items():
        field = f"data.shares.{name}"
        rounded = Fraction(number(field, share, 0)).limit_denominator(1000)
        expect(rounded > 0 or share == 0, field, share, "must be 0 or at least 0.001")
        exact.append(rounded)
    expect(any(exact), "data.shares", dict(shares), "must not all be 0")
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    counts = [count // math.gcd(*whole) for count in whole]
    fits = sum(counts) <= LONGEST_BLOCK
    expect(fits, "data.shares", dict(shares), "must be simple numbers, such as 0.7 and 0.3")
    return counts


def one_size(parts: Mapping[str, CacheableData]) -> Size:
    """Height and width of all images of all parts.

    Raises:
        UserError: a part is empty, or images differ in size.
    """
    first = dict[Size, str]()
    for name, part in parts.items():
        expect(len(part) > 0, f"data.parts.{name}", part, "is empty: every part needs an image")
        for size in {part.size_of(index) for index in range(len(part))}:
            first.setdefault(size, name)
    if len(first) > 1:
        (one, here), (other, there), *_ = first.items()
        raise UserError(
            f"data.parts: images of a mixture have one size, but {here} has {one[1]} x {one[0]} "
            f"and {there} has {other[1]} x {other[0]} pixels: give all parts the same image_size, "
            "and max_ratio=1 to those of files"
        )
    return next(iter(first))


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one sample each as one.

    Raises:
        UserError: they differ in what else comes with an image.
    """
    names = {tuple(sorted(batch.extra)) for batch in batches}
    if len(names) > 1:
        raise UserError(
            f"data.parts: Batch.extra has {sorted(names)}: it must be alike in all parts"
        )
    return Batch(
        torch.cat([batch.images for batch in batches]),
        [caption for batch in batches for caption in batch.captions],
        {name: torch.cat([batch.extra[name] for batch in batches]) for name in names.pop()},
    )
