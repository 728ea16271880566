"""Image files with captions, opened once; `CaptionedImages` views them as train and validation.

`Folder` and `TarShards` are the two implementations. Another one needs `names`, `sizes`, `read`.
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
    """Encoded images and their captions. Every image is decoded once on opening, to validate it.

    Instances are picklable: in distributed training one process opens them and sends them to the
    others.

    Attributes:
        place: their location, for messages.
        names: unique image names, in data set order.
        sizes: height and width of each image in pixels after EXIF rotation, (n, 2).

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
            BadImage: it has changed since the files were opened.
        """

    def checksum(self, index: int) -> tuple[int, int]:
        """Length in bytes and CRC-32 of an encoded image, as recorded on opening."""
        data, _ = self.read(index)
        return len(data), zlib.crc32(data)

    def stamp(self, index: int) -> str:
        """A string that changes with the image or its captions, but not with their location.

        Raises:
            BadImage: the image or its captions no longer exist.
        """
        data, captions = self.read(index)
        return json.dumps([len(data), zlib.crc32(data), captions], sort_keys=True)
