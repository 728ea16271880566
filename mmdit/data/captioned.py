"""Captioned images of any size, batched by size."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmdit.checks import did_you_mean, expect, nearest, number, one_of, seed_number, whole_number
from mmdit.data.buckets import Buckets, Size, fit
from mmdit.data.caption_sources import Captions, check_mix, choose
from mmdit.data.dataset import Batch
from mmdit.data.drawing import Image
from mmdit.data.files import Files
from mmdit.data.images import BadImage, decode
from mmdit.data.order import BucketedOrder
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.printable import logger

log = logger(__name__)

SPLITS = ("train", "validation")
CROPS = ("centre", "random")
T = TypeVar("T")


class ImageOptions:
    """How images are split, cropped and captioned.

    Args:
        image_size: S; images in a batch have about S**2 pixels each.
        mix: kind of caption -> relative frequency; None uses 'text' alone.
        samples: size of a training subset chosen by hash of the names, so that larger subsets
            contain smaller ones. None uses all images.
        unit: sides are multiples of it: the autoencoder's downsampling factor times the patch size.
        max_ratio: largest aspect ratio; 1 makes all batches square.
        crop: 'centre' or 'random'.
        validation_fraction: fraction of the images held out for validation, at least one image; a
            single image is in both splits. None puts all images in both.
        seed: seed of the choice of captions and crops.
    """

    def __init__(
        self,
        *,
        image_size: int,
        mix: Mapping[str, float] | None = None,
        samples: int | None = None,
        unit: int = 16,
        max_ratio: float = 4.0,
        crop: str = "random",
        validation_fraction: float | None = 0.01,
        seed: int = 0,
    ) -> None:
        one_of("crop", crop, CROPS)
        seed_number("seed", seed)
        if samples is not None:
            whole_number("samples", samples, 1)
        if validation_fraction is not None:
            number("validation_fraction", validation_fraction, 0, below=1)
        self.buckets = Buckets(image_size=image_size, unit=unit, max_ratio=max_ratio)
        self.mix = check_mix({"text": 1.0} if mix is None else mix)
        self.image_size, self.samples, self.crop, self.seed = image_size, samples, crop, seed
        self.validation_fraction = validation_fraction

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of captions, as in `mix`."""
        return tuple(self.mix)


class CaptionedImages:
    """A finite data set of images and captions: one split of open `Files`.

    The images and their order depend on the files alone. An image's split depends only on its
    name, so adding images does not move others between splits. The caption and the crop that a
    step sees are keyed by (seed, step, index).

    Args:
        files: the open files.
        options: how their images are split, cropped and captioned.
        split: 'train' or 'validation'.

    Raises:
        UserError: the split is empty.
    """

    name = "images"

    def __init__(self, files: Files, options: ImageOptions, split: str = "train") -> None:
        one_of("split", split, SPLITS)
        self.files, self.options, self.split = files, options, split
        self.buckets, self.seed, self.mix = options.buckets, options.seed, options.mix
        kept = positions_of(files, options, split)
        self._positions = np.array(kept, np.int64)  # in `files`
        self.names: Sequence[str] = [files.names[i] for i in kept]
        self.sizes: NDArray[np.int32] = np.asarray(files.sizes, np.int32).reshape(-1, 2)[kept]
        self.bucket_of = self.buckets.of(self.sizes)  # (n,): index into buckets.sizes

    def view(self, split: str) -> "CaptionedImages":
        """Another split of the same files, which are not opened again."""
        return CaptionedImages(self.files, self.options, split)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of captions, sorted."""
        return tuple(sorted(self.mix))

    def read(self, index: int) -> tuple[bytes, Captions]:
        """The encoded image and its captions, by kind.

        Raises:
            BadImage: it has changed since the files were opened.
        """
        return self.files.read(int(self._positions[index]))

    def image(self, index: int) -> Image:
        """The uncropped image after EXIF rotation: uint8 (h, w, 3)."""
        return self._open(index)[0]

    def size_of(self, index: int) -> Size:
        """Height and width of a sample in its batch: the size of its bucket."""
        return self.buckets.sizes[self.bucket_of[index]]

    def sample(self, index: int, step: int) -> tuple[Image, str]:
        """A sample as training step `step` sees it: uint8 (*size_of(index), 3), and a caption."""
        image, captions = self._open(index)
        position = 0.5
        if self.options.crop == "random":
            generator = generator_for(self.seed, "crop", step, index)
            position = float(torch.rand((), generator=generator, dtype=torch.float64))
        return fit(image, self.size_of(index), position), self.pick(captions, index, step)

    def pick(self, captions: Mapping[str, Sequence[T]], index: int, step: int) -> T:
        """The one of a sample's captions that step `step` sees."""
        return choose(captions, self.mix, generator_for(self.seed, "caption", step, index))

    def cacheable(self, index: int) -> tuple[Image, Captions]:
        """The image, identical at every step, and all its captions.

        Raises:
            UserError: crops are random.
        """
        self._expect_centre_crop()
        image, captions = self._open(index)
        return fit(image, self.size_of(index)), captions

    def identity(self) -> dict[str, Any]:
        """Plain data that determines `cacheable`: equal identities mean equal images and captions.

        Raises:
            UserError: crops are random, or a file no longer exists.
        """
        self._expect_centre_crop()
        return {
            "images": len(self),
            "content": self._digest(self.files.stamp),
            "captions": list(self.kinds),
            "sizes": [list(size) for size in self.buckets.sizes],
        }

    def fingerprint(self) -> dict[str, Any]:
        """A hash of the images, independent of their location and captions."""
        content = self._digest(lambda position: str(list(self.files.checksum(position))))
        return {"images": len(self), "content": content[:16]}

    def batch(self, indices: Iterable[int], step: int = 0) -> Batch:
        """Images as one uint8 tensor (b, h, w, 3), and captions, as `step` sees them.

        Raises:
            ValueError: the samples differ in size; take the indices from `order`.
        """
        indices = list(indices)
        sizes = {self.size_of(index) for index in indices}
        expect(len(sizes) == 1, "indices", indices, f"must be of one size, not {sorted(sizes)}")
        samples = [self.sample(index, step) for index in indices]
        images = torch.from_numpy(np.stack([image for image, _ in samples]))
        return Batch(images, [caption for _, caption in samples])

    def square(self, indices: Iterable[int]) -> Batch:
        """Images centre-cropped to S x S, uint8 (b, S, S, 3), and their captions.

        Independent of the step, so that metrics can be compared.
        """
        side, images, chosen = self.options.image_size, [], []
        for index in indices:
            image, captions = self._open(index)
            images.append(fit(image, (side, side)))
            chosen.append(choose(captions, self.mix, generator_for(self.seed, "square", index)))
        return Batch(torch.from_numpy(np.stack(images)), chosen)

    def order(self, *, batch_size: int, seed: int) -> BucketedOrder:
        """The training order, in global batches of one size each."""
        groups = [f"{height}x{width}" for height, width in self.buckets.sizes]
        return BucketedOrder(
            group_of=self.bucket_of, groups=groups, batch_size=batch_size, seed=seed
        )

    def prompts(self) -> list[str]:
        """Empty: captions of validation images serve as prompts."""
        return []

    def _digest(self, row: Callable[[int], str]) -> str:
        """SHA-256 of the names, sizes and `row` of all images, in order."""
        digest = hashlib.sha256()
        for index, position in enumerate(self._positions.tolist()):
            height, width = self.sizes[index]
            try:
                line = f"{self.names[index]}\0{height}x{width} {row(position)}\n"
            except BadImage as error:
                raise self._changed(index, f": {error}") from error
            digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _expect_centre_crop(self) -> None:
        if self.options.crop != "centre":
            raise UserError(
                f"data.crop={self.options.crop} crops an image differently at each step, so its "
                "latents cannot be cached: choose data.crop=centre, or latents=from_pixels"
            )

    def _open(self, index: int) -> tuple[Image, Captions]:
        height, width = self.sizes[index].tolist()
        try:
            data, captions = self.read(index)
            image = decode(data, max_pixels=height * width)
        except BadImage as error:
            raise self._changed(index, f": {error}") from error
        if image.shape[:2] != (height, width) or not any(map(captions.get, self.mix)):
            raise self._changed(index)
        return image, captions

    def _changed(self, index: int, reason: str = "") -> UserError:
        name = self.names[index]
        return UserError(
            f"{name} has changed since the data set was opened{reason}. Leave the images "
            "alone while a program reads them, and start it again"
        )


def opener(files: type[Files]) -> Callable[..., CaptionedImages]:
    """A function that opens `files` as a data set: the `_target_` of a yaml of the group data/.

    It takes the arguments of both `files` and `ImageOptions`, so that `data.root` and `data.crop`
    stand side by side in a config; `kinds` follows from `mix`. The options are checked first,
    since opening many files takes long.

    Example:
        image_folder = opener(Folder)
        data = image_folder(root="photos", captions=Sidecars(), image_size=256, crop="centre")
    """
    of_options = inspect.signature(ImageOptions).parameters
    of_files = {
        name: parameter
        for name, parameter in inspect.signature(files).parameters.items()
        if name != "kinds"
    }
    parameters = {**of_files, **of_options}
    label, takes_kinds = files.__name__, "kinds" in inspect.signature(files).parameters

    def opened(**given: Any) -> CaptionedImages:
        for argument in given:
            if argument not in parameters:
                hint = did_you_mean(nearest(argument, parameters))
                raise UserError(f"{label} has no argument {argument!r}.{hint}")
        options = ImageOptions(**{key: given[key] for key in given.keys() & of_options.keys()})
        located = {key: given[key] for key in given.keys() & of_files.keys()}
        kinds = {"kinds": options.kinds} if takes_kinds else {}
        return CaptionedImages(files(**located, **kinds), options)

    opened.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    opened.__module__ = files.__module__  # a config may name it where it may name `files`
    opened.__doc__ = f"Open a `{label}` as a data set; see also `ImageOptions`."
    return opened


def positions_of(files: Files, options: ImageOptions, split: str) -> list[int]:
    """The positions in `files` of the images of a split, ascending.

    Raises:
        UserError: the split is empty.
    """
    names = files.names
    hashes = [split_hash(name) for name in names]
    shared = options.validation_fraction is None or len(names) == 1
    limit = (options.validation_fraction or 0.0) * 2**64
    held_back = {i for i, value in enumerate(hashes) if value < limit}
    if not held_back and limit and len(names) > 1:  # one image of a small set
        held_back = {min(range(len(names)), key=hashes.__getitem__)}
    kept = [i for i in range(len(names)) if (i in held_back) == (split != "train")]
    if shared:
        kept = list(range(len(names)))
        if len(names) == 1 and split == "validation":
            log.warning("%s has one image: it is used for training and validation", files.place)
    if split == "train" and options.samples is not None:
        kept = sorted(sorted(kept, key=hashes.__getitem__)[: options.samples])
    if not kept:
        raise UserError(
            f"split {split!r} has none of the {len(names)} images of {files.place}: change "
            f"data.validation_fraction={options.validation_fraction}, for example to 0.1"
        )
    return kept


def split_hash(name: str) -> int:
    """A uniform hash of an image's name, in [0, 2^64), that decides its split and subset."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
