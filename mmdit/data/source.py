"""Captioned images of many sizes as batches of one size: what all image data sets share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmdit.checks import expect, expect_number, expect_whole, one_of, seed_number
from mmdit.data.buckets import Buckets, Size, fit
from mmdit.data.caption_sources import Captions, check_mix, choose
from mmdit.data.drawing import Image
from mmdit.data.images import BadImage, decode
from mmdit.data.order import BucketedOrder
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.printable import logger

log = logger(__name__)

SPLITS = ("train", "validation")
CROPS = ("centre", "random")
T = TypeVar("T")


class CaptionedImages(ABC):
    """A finite data set of images and captions, in the order of their names.

    Which images there are, and in which order, depends on the content of the data set alone. What
    a step sees of one (the caption, the crop) is keyed by (seed, step, index).

    Args:
        split: 'train' or 'validation'; an image's side is decided by its name alone, so adding
            images moves none.
        validation_fraction: share of the images held back for validation, but one at least; an
            only image is in both splits.
        image_size: S; a batch has about S**2 pixels an image.
        unit: every side is a multiple of it: the autoencoder's factor times the patch.
        max_ratio: largest ratio of the sides; 1 makes all batches square.
        crop: 'centre' or 'random'.
        mix: kind of caption -> relative frequency; None is 'text' alone.
        samples: train on so many images only, chosen by their names: a larger number adds to a
            smaller one. None is all.
        max_pixels: of a file; larger ones are set aside.
        max_bad_fraction: of images set aside, above which the run stops.
        seed: of the choice of captions and crops.
    """

    names: Sequence[str]  # of what a sample was made from, by index
    sizes: NDArray[np.int32]  # (n, 2): height and width in pixels, upright
    bucket_of: NDArray[np.int64]  # (n,): index into buckets.sizes

    def __init__(
        self,
        *,
        split: str,
        validation_fraction: float,
        image_size: int,
        unit: int,
        max_ratio: float,
        crop: str,
        mix: Mapping[str, float] | None,
        samples: int | None,
        max_pixels: int,
        max_bad_fraction: float,
        seed: int,
    ) -> None:
        one_of("split", split, SPLITS)
        one_of("crop", crop, CROPS)
        expect_whole("max_pixels", max_pixels, 1)
        seed_number("seed", seed)
        if samples is not None:
            expect_whole("samples", samples, 1)
        for field, value in (
            ("validation_fraction", validation_fraction),
            ("max_bad_fraction", max_bad_fraction),
        ):
            expect_number(field, value)
            expect(0 <= value < 1, field, value, "must be in [0, 1)")
        self.split, self.validation_fraction = split, validation_fraction
        self.buckets = Buckets(image_size=image_size, unit=unit, max_ratio=max_ratio)
        self.image_size, self.crop, self.seed = image_size, crop, seed
        self.mix, self.samples = check_mix({"text": 1.0} if mix is None else mix), samples
        self.max_pixels, self.max_bad_fraction = max_pixels, max_bad_fraction

    def __len__(self) -> int:
        return len(self.names)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of captions, sorted."""
        return tuple(sorted(self.mix))

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, Captions]:
        """The encoded image and its captions of the mix, by kind.

        Raises:
            BadImage: it is not what it was when the data set was opened.
        """

    def image(self, index: int) -> Image:
        """The whole picture, upright: uint8 (h, w, 3)."""
        return self._open(index)[0]

    def size_of(self, index: int) -> Size:
        """Height and width that a sample has in a batch, a size of `buckets`."""
        return self.buckets.sizes[self.bucket_of[index]]

    def sample(self, index: int, step: int) -> tuple[Image, str]:
        """What training step `step` sees of a sample: uint8 (*size_of(index), 3), and a caption."""
        image, captions = self._open(index)
        position = 0.5
        if self.crop == "random":
            generator = generator_for(self.seed, "crop", step, index)
            position = float(torch.rand((), generator=generator, dtype=torch.float64))
        return fit(image, self.size_of(index), position), self.pick(captions, index, step)

    def pick(self, captions: Mapping[str, Sequence[T]], index: int, step: int) -> T:
        """The caption that step `step` sees of a sample, of all that it has."""
        return choose(captions, self.mix, generator_for(self.seed, "caption", step, index))

    def whole(self, index: int) -> tuple[Image, Captions]:
        """The picture as every step sees it, and all captions: what can be kept.

        Raises:
            UserError: steps see different crops.
        """
        self._expect_no_chance()
        image, captions = self._open(index)
        return fit(image, self.size_of(index)), captions

    def identity(self) -> dict[str, Any]:
        """All that `whole` follows from, as plain data: two of the same give the same.

        Raises:
            UserError: steps see different crops, or a file is gone.
        """
        self._expect_no_chance()
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            height, width = self.sizes[index]
            row = f"{name}\0{height}x{width} {self._stamp(index)}\n"
            digest.update(row.encode("utf-8", "surrogatepass"))
        return {
            "images": len(self),
            "content": digest.hexdigest(),
            "captions": list(self.kinds),
            "sizes": [list(size) for size in self.buckets.sizes],
        }

    def fingerprint(self) -> dict[str, Any]:
        """What tells these pictures from others, wherever they lie and whatever is said of them."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            height, width = self.sizes[index]
            row = f"{name}\0{height}x{width} {self._picture(index)}\n"
            digest.update(row.encode("utf-8", "surrogatepass"))
        return {"images": len(self), "content": digest.hexdigest()[:16]}

    def batch(self, indices: Iterable[int], step: int = 0) -> tuple[torch.Tensor, list[str]]:
        """Pictures as one uint8 tensor (b, h, w, 3), and captions, as `step` sees them.

        Raises:
            ValueError: the samples are of several sizes; take the indices from `order`.
        """
        indices = list(indices)
        sizes = {self.size_of(index) for index in indices}
        expect(len(sizes) == 1, "indices", indices, f"must be of one size, not {sorted(sizes)}")
        samples = [self.sample(index, step) for index in indices]
        images = torch.from_numpy(np.stack([image for image, _ in samples]))
        return images, [caption for _, caption in samples]

    def square(self, indices: Iterable[int]) -> tuple[torch.Tensor, list[str]]:
        """Pictures cropped to S x S at their centres, uint8 (b, S, S, 3), and their captions.

        Always the same ones, whatever the step: for figures that are to be compared.
        """
        images, captions = [], []
        for index in indices:
            image, told = self._open(index)
            images.append(fit(image, (self.image_size, self.image_size)))
            captions.append(choose(told, self.mix, generator_for(self.seed, "square", index)))
        return torch.from_numpy(np.stack(images)), captions

    def order(self, *, batch_size: int, seed: int) -> BucketedOrder:
        """The order of training, in global batches of one size each."""
        groups = [f"{height}x{width}" for height, width in self.buckets.sizes]
        return BucketedOrder(
            group_of=self.bucket_of, groups=groups, batch_size=batch_size, seed=seed
        )

    @abstractmethod
    def _picture(self, index: int) -> list[int]:
        """Length in bytes and CRC-32 of a sample's image, as when the data set was opened."""

    @abstractmethod
    def _stamp(self, index: int) -> str:
        """What tells a sample's files from others: lengths, hashes, captions.

        Raises:
            UserError: they are gone.
        """

    def _expect_no_chance(self) -> None:
        if self.crop != "centre":
            raise UserError(
                f"data.crop={self.crop} shows another part of a picture at each step, so its "
                "latents cannot be kept: choose data.crop=centre, or latents=from_pixels"
            )

    def _open(self, index: int) -> tuple[Image, Captions]:
        try:
            data, captions = self.read(index)
            image = decode(data, max_pixels=self.max_pixels)
        except BadImage as error:
            raise self._changed(index, f": {error}") from error
        if image.shape[:2] != tuple(self.sizes[index]) or not any(map(captions.get, self.mix)):
            raise self._changed(index)
        return image, captions

    def _changed(self, index: int, reason: str = "") -> UserError:
        name = self.names[index]
        return UserError(f"{name} has changed since the data set was opened{reason}")

    def _keep(self, names: Sequence[str], sizes: Sequence[Size], place: object) -> list[int]:
        """Take over the images of this split; returns their positions in `names`."""
        lots = [lot(name) for name in names]
        limit = self.validation_fraction * 2**64
        held_back = {i for i, drawn in enumerate(lots) if drawn < limit}
        if not held_back and limit and len(names) > 1:  # of a small set, one
            held_back = {min(range(len(names)), key=lots.__getitem__)}
        kept = [i for i in range(len(names)) if (i in held_back) == (self.split != "train")]
        if len(names) == 1:
            kept = [0]
            if self.split == "validation":
                log.warning("%s holds one image: validation sees what is trained on", place)
        if self.split == "train" and self.samples is not None:
            kept = sorted(sorted(kept, key=lots.__getitem__)[: self.samples])
        if not kept:
            raise UserError(
                f"split {self.split!r} has none of the {len(names)} images of {place}: "
                f"data.validation_fraction={self.validation_fraction} must be another, such as 0.1"
            )
        self.names = [names[i] for i in kept]
        self.sizes = np.array([sizes[i] for i in kept], np.int32).reshape(-1, 2)
        self.bucket_of = self.buckets.of(self.sizes)
        return kept


def lot(name: str) -> int:
    """What an image draws by its name, in [0, 2^64): who is held back, and who is left out."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def has_caption(captions: Captions, mix: Iterable[str]) -> bool:
    """Whether an image has a caption of any kind of the mix."""
    return any(captions.get(kind) for kind in mix)
