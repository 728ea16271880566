"""Image files with captions, opened once: what `CaptionedImages` views as train and validation.

`Folder` and `TarShards` are two kinds. A third is one class, with `names`, `sizes` and `read`.
"""

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdit.data.caption_sources import Captions


class Files(ABC):
    """Encoded images and their captions, each decoded once when they were opened.

    They can be pickled: where several processes train, one opens them and the others receive them.

    Attributes:
        place: where they lie, for messages.
        names: of the images, each once. Their order is that of the data set.
        sizes: height and width of each in pixels, upright, (n, 2).

    Example:
        class InMemory(Files):
            def __init__(self, images: Mapping[str, tuple[bytes, str]]) -> None:
                self._images = images
                self.names = sorted(images)
                decoded = [decode(images[name][0]) for name in self.names]
                self.sizes = np.array([image.shape[:2] for image in decoded])

            def read(self, index: int) -> tuple[bytes, Captions]:
                data, caption = self._images[self.names[index]]
                return data, {"text": (caption,)}

        data = CaptionedImages(InMemory(images), ImageOptions(image_size=256))
    """

    place: str | Path = "the data set"
    names: Sequence[str]
    sizes: NDArray[np.integer]

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, Captions]:
        """The encoded image and its captions, by kind.

        Raises:
            BadImage: it is not what it was when the files were opened.
        """

    def checksum(self, index: int) -> tuple[int, int]:
        """Length in bytes and CRC-32 of an encoded image, as when the files were opened."""
        data, _ = self.read(index)
        return len(data), zlib.crc32(data)

    def stamp(self, index: int) -> str:
        """A text that changes with an image or its captions, wherever they lie.

        Raises:
            BadImage: they are gone.
        """
        data, captions = self.read(index)
        return json.dumps([len(data), zlib.crc32(data), captions], sort_keys=True)
