"""Aspect-ratio buckets: every image gets the nearest aspect ratio among sizes of about S**2 pixels.

Source: the paper's finetuning at high resolution (Sec. 5.3), after NovelAI's buckets.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image as Pillow

from mmdit.checks import expect, number, whole_number
from mmdit.data.drawing import Image

Size: TypeAlias = tuple[int, int]  # height, width


class Buckets:
    """The sizes (h, w) of batches, widest last.

    There is one for each short side from S / sqrt(max_ratio) to S in steps of `unit`, in landscape
    and in portrait; the long side is the multiple of `unit` that comes nearest to S**2 pixels.

    Args:
        image_size: S, a multiple of `unit`; S x S is always among the sizes.
        unit: sides are multiples of it.
        max_ratio: largest ratio of long to short side, at least 1.
    """

    def __init__(self, *, image_size: int, unit: int, max_ratio: float) -> None:
        whole_number("unit", unit, 1)
        whole_number("image_size", image_size, 1)
        expect(
            image_size % unit == 0, "image_size", image_size, f"must be a multiple of unit {unit}"
        )
        number("max_ratio", max_ratio, 1)
        sizes = {(image_size, image_size)}
        for short in range(unit, image_size, unit):
            long = round(image_size**2 / short / unit) * unit
            if long <= max_ratio * short:
                sizes |= {(short, long), (long, short)}
        self.sizes: tuple[Size, ...] = tuple(sorted(sizes, key=lambda size: size[1] / size[0]))

    def of(self, sizes: ArrayLike) -> NDArray[np.int64]:
        """The bucket index (n,) of images of sizes (n, 2) (height, width), by nearest log ratio.

        More extreme ratios go to the outermost bucket, and lose more to the crop.
        """
        given = np.asarray(sizes, np.float64).reshape(-1, 2)
        ratios = np.log([width / height for height, width in self.sizes])
        between = (ratios[1:] + ratios[:-1]) / 2
        return np.searchsorted(between, np.log(given[:, 1] / given[:, 0]))


def window(image: Size, size: Size, position: float) -> tuple[float, float, float, float]:
    """The largest window of the aspect ratio of `size` in an image: left, top, right, bottom.

    `position` in [0, 1] moves it along the side that is cropped; 0.5 is the centre.
    """
    (height, width), (rows, columns) = image, size
    scale = min(height / rows, width / columns)
    # One side fits exactly; rounding must not push the window outside the image.
    tall, wide = min(rows * scale, height), min(columns * scale, width)
    top, left = (height - tall) * position, (width - wide) * position
    return left, top, min(left + wide, width), min(top + tall, height)


def fit(image: Image, size: Size, position: float = 0.5) -> Image:
    """Crop and resize an image (h, w, 3) to `size`.

    The window is resampled once, so that an extreme aspect ratio needs no huge intermediate image.
    The filter is Pillow's bicubic, whose support widens with the reduction, so it does not alias.
    Lanczos is slightly sharper but overshoots more at edges. Frechet distances are commonly
    computed after bicubic resizing, and so are this project's.
    """
    given = (image.shape[0], image.shape[1])
    if given == size:
        return image
    height, width = size
    box = window(given, size, position)
    resized = Pillow.fromarray(image).resize((width, height), Pillow.Resampling.BICUBIC, box=box)
    return np.array(resized)
