"""What training asks of a data set: batches of one size, keyed by the step."""

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

    `extra` is for what only some tasks need, by name and with one row a sample: masks, control
    images, the other image of a pair. It reaches the network as `Condition.extra`. Sources that
    keep latents keep images and captions alone, so it needs latents=from_pixels.
    """

    images: Tensor  # uint8 (b, h, w, 3)
    captions: list[str]
    extra: dict[str, Tensor] = {}  # noqa: RUF012  # never written to


class Data(Protocol):
    """A data set as training sees it: samples of one size in a batch, keyed by the step.

    It can be pickled: where several processes train, one opens it and the others receive it.
    """

    @property
    def name(self) -> str:
        """The kind of data: 'shapes' has scenes that can be judged, 'images' are files."""

    def __len__(self) -> int: ...

    def view(self, split: str) -> Self:
        """Another split of the same data, which is not opened again."""

    def batch(self, indices: Sequence[int], step: int = 0) -> Batch:
        """Samples as a step sees them."""

    def square(self, indices: Sequence[int]) -> Batch:
        """The same at S x S, cropped at the centre: for validation, whatever the step."""

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Sample indices by position, in batches of one size each."""

    def prompts(self) -> list[str]:
        """Prompts worth sampling to watch training; empty for those of the validation images."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells its images from those of the same config; empty if the config tells all.

        A run that is resumed compares it, and not `data.root`.
        """


class CacheableData(Data, Protocol):
    """A data set without random augmentation, whose latents can be kept."""

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of captions."""

    def size_of(self, index: int) -> Size:
        """Height and width of an image in a batch."""

    def cacheable(self, index: int) -> tuple[Image, Captions]:
        """The image as every step sees it, and all captions.

        Raises:
            UserError: steps see different crops.
        """

    def pick(self, captions: Mapping[str, Sequence[T]], index: int, step: int) -> T:
        """The caption that a step sees of a sample, of all that it has."""

    def identity(self) -> dict[str, Any]:
        """All that `cacheable` follows from, as plain data."""
