"""Captioned images in tar shards in WebDataset's layout, with random access.

The library `webdataset` streams such shards, so its order depends on shards, workers and a shuffle
buffer. Here the training order is a pure function of (seed, position) for any number of processes:
each shard has an index (`mmdit.data.shard_index`), and reading a sample takes one seek.
"""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdit.data.bad_images import check_limits, expect_kinds, report_bad
from mmdit.data.buckets import Size
from mmdit.data.caption_sources import Captions, columns_of, lines_of, object_of
from mmdit.data.captioned import opener
from mmdit.data.files import Files
from mmdit.data.images import MAX_PIXELS, BadImage
from mmdit.data.patterns import find, find_shards
from mmdit.data.samples import Sample
from mmdit.data.shard_index import index_path, index_shards
from mmdit.data.tar import Span
from mmdit.errors import UserError

PACKED = "pack.json"  # the record that `mmdit.data.pack` writes beside its shards


class TarShards(Files):
    """Tar shards below a folder, each sample an image with captions.

    Captions of the kind "text" are the lines of `.txt`, those of another kind the lines of
    `.<kind>.txt`; without such a member, the string or list of strings under that key in `.json`.

    Samples are ordered by shard name, then by position in the shard. A folder of images and the
    shards packed from it are the same data set: same names, order, splits and images.

    Args:
        root: the folder.
        shards: pattern of the shards, such as "cc12m-{000000..000009}.tar"; by default all shards
            that were packed there, or all *.tar.
        kinds: the kinds of captions to read.
        max_pixels: largest number of pixels in an image; larger images are set aside.
        max_bad_fraction: opening fails if a larger fraction of the images is set aside.
        report: JSON file that lists the images set aside, with reasons.
        index: folder for the indices of the shards; by default each is beside its shard.
        threads: number of threads that decode the images of shards without an index.

    Raises:
        UserError: a shard is missing, truncated or damaged, packing has not finished, no image is
            usable, too many are bad, or a kind of caption never occurs.
    """

    def __init__(
        self,
        *,
        root: str,
        shards: str | None = None,
        kinds: Sequence[str] = ("text",),
        max_pixels: int = MAX_PIXELS,
        max_bad_fraction: float = 0.02,
        report: str | None = None,
        index: str | None = None,
        threads: int = 8,
    ) -> None:
        check_limits(max_pixels=max_pixels, max_bad_fraction=max_bad_fraction, threads=threads)
        self.place = Path(root)
        self._index = Path(index) if index else None
        self.shards = find(self.place, shards) if shards else _all_shards(self.place)
        names, sizes, bad, found = list[str](), list[Size](), dict[str, str](), set[str]()
        # Arrays, since millions of sample objects would fill the memory of every worker.
        shard_of, images = array("q"), array("q")
        captions = {kind: array("q") for kind in kinds}
        indices = index_shards(
            self.shards,
            root=self.place,
            folder=self._index,
            max_pixels=max_pixels,
            threads=threads,
        )
        for number, (shard, content) in enumerate(indices):
            bad.update({f"{shard}/{key}": reason for key, reason in content.bad.items()})
            for sample in content.samples:
                name = sample.origin or f"{shard}/{sample.key}"
                found.update(sample.kinds)
                reason = _unusable(sample, kinds, max_pixels)
                if reason:
                    bad[name] = reason
                    continue
                names.append(name)
                sizes.append((sample.height, sample.width))
                shard_of.append(number)
                images.extend(sample.image)
                for kind, spans in captions.items():
                    spans.extend(_caption_span(sample, kind))
        report_bad(
            bad,
            files=len(names) + len(bad),
            place=self.place,
            report=Path(report) if report else None,
            limit=max_bad_fraction,
        )
        expect_kinds(kinds, found, root)
        self.names, self.sizes = names, np.array(sizes, np.int32)
        self._shard_of = _rows(shard_of, 1)[:, 0]
        self._images = _rows(images, 3)
        self._captions = {kind: _rows(spans, 4) for kind, spans in captions.items()}

    def read(self, index: int) -> tuple[bytes, Captions]:
        path = self.shards[self._shard_of[index]]
        captions = {}
        try:
            # Opened for each read: no descriptor to share between processes or to run out of.
            with path.open("rb") as file:
                for kind, spans in self._captions.items():
                    *span, in_table = spans[index].tolist()
                    data = Span(*span).read(file)
                    if in_table:
                        captions[kind] = columns_of(object_of(data, ".json"))[kind]
                    elif data:
                        captions[kind] = lines_of(data, kind)
                return Span(*self._images[index].tolist()).read(file), captions
        except FileNotFoundError as error:
            raise BadImage(f"{path} no longer exists") from error
        except BadImage as error:
            beside = self._index / path.relative_to(self.place) if self._index else path
            raise BadImage(
                f"{error}: if {path} was replaced, delete its index {index_path(beside)}"
            ) from error

    def checksum(self, index: int) -> tuple[int, int]:
        _, length, crc32 = self._images[index].tolist()
        return length, crc32

    def stamp(self, index: int) -> str:
        """From the index alone, which also has the checksums of the captions."""
        spans = [self._images[index], *(spans[index] for spans in self._captions.values())]
        # The offset within the shard does not matter.
        return json.dumps([span[1:].tolist() for span in spans])


tar_shards = opener(TarShards)


def _unusable(sample: Sample, kinds: Sequence[str], max_pixels: int) -> str | None:
    """Why an intact sample cannot be used here, or None."""
    if sample.height * sample.width > max_pixels:
        size = f"{sample.width} x {sample.height}"
        return f"{size} pixels are more than the limit of {max_pixels}"
    if not sample.kinds & {*kinds}:
        return f"has no caption of the kind {' or '.join(kinds)}"
    return None


def _all_shards(root: Path) -> list[Path]:
    """The shards that were packed into a folder, or all its *.tar.

    Raises:
        UserError: packing has not finished, a shard is missing, or there are no shards.
    """
    packed = root / PACKED
    if not packed.is_file():
        return find_shards(root)
    try:
        record = json.loads(packed.read_text(encoding="ascii"))
        complete = record["complete"]
        lengths = {name: int(shard["bytes"]) for name, shard in record["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{packed} is damaged: name the shards as shards='*.tar'") from error
    if not complete:
        raise UserError(f"packing {root} has not finished: run the same command again")
    for name, length in lengths.items():
        path = root / name
        if not path.is_file() or path.stat().st_size != length:
            raise UserError(f"{path} is missing or changed: it was packed with {length} bytes")
    return [root / name for name in lengths]


def _caption_span(sample: Sample, kind: str) -> tuple[int, ...]:
    """Offset, length, CRC, and 1 if the span is a .json; zeros if there is no caption."""
    if kind in sample.texts:
        return *sample.texts[kind], 0
    if kind in sample.columns and sample.table:
        return *sample.table, 1
    return 0, 0, 0, 0


def _rows(values: array, width: int) -> NDArray[np.int64]:
    return np.array(values, np.int64).reshape(-1, width)
