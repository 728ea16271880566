"""The interface between training and data sets: batches of one size, keyed by the step."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from torch import Tensor

from mmdit.data.buckets import Size
from mmdit.data.caption_sources import Captions
from mmdit.data.drawing import Image
from mmdit.data.order import Order

T = TypeVar("T")


class Batch(NamedTuple):
    """Samples of one size, on the CPU.

    `extra` holds further tensors by name, with one row per sample, for tasks that need them: masks,
    control images, the other image of a pair. What the network reads (`Backbone.reads`) reaches it
    as `Condition.extra`. Latent caches store images and captions alone, so `extra` requires
    latents=from_pixels.
    """

    images: Tensor  # uint8 (b, h, w, 3)
    captions: list[str]
    extra: dict[str, Tensor] = {}  # noqa: RUF012  # never written to


class Data(Protocol):
    """A data set as training sees it: batches of samples of one size, keyed by the step.

    Instances are picklable: in distributed training one process opens the data set and sends it to
    the others.
    """

    @property
    def name(self) -> str:
        """The kind of data: 'shapes' (toy scenes, scored by rules) or 'images' (files)."""

    def __len__(self) -> int: ...

    def view(self, split: str) -> Self:
        """Another split of the same data, without opening it again."""

    def batch(self, indices: Sequence[int], step: int = 0) -> Batch:
        """A batch of samples as step `step` sees them."""

    def square(self, indices: Sequence[int]) -> Batch:
        """A batch centre-cropped to S x S, independent of the step: for validation."""

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Sample indices by position, in batches of one size each."""

    def prompts(self) -> list[str]:
        """Prompts to sample during training; if empty, captions of validation images are used."""

    def fingerprint(self) -> dict[str, Any]:
        """Plain data that identifies the images; empty if the config alone determines them.

        A resumed run compares the fingerprint instead of `data.root`.
        """


class CacheableData(Data, Protocol):
    """A data set without random augmentation, whose latents can be cached."""

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of captions."""

    def size_of(self, index: int) -> Size:
        """Height and width of an image in a batch."""

    def cacheable(self, index: int) -> tuple[Image, Captions]:
        """The image, identical at every step, and all its captions.

        Raises:
            UserError: crops are random.
        """

    def pick(self, captions: Mapping[str, Sequence[T]], index: int, step: int) -> T:
        """The one of a sample's captions that step `step` sees."""

    def identity(self) -> dict[str, Any]:
        """Plain data that determines `cacheable`."""
