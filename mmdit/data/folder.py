"""A folder of images with captions."""

import functools
import hashlib
import heapq
import json
import os
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmdit.data.bad_images import check_limits, expect_kinds, report_bad
from mmdit.data.caption_sources import Captions, CaptionSource, has_caption
from mmdit.data.captioned import opener
from mmdit.data.files import Files
from mmdit.data.folder_index import Decoded, FolderIndex, status_of
from mmdit.data.images import MAX_PIXELS, NOWHERE, BadImage, Missing, decode, read_bytes
from mmdit.data.missing import Likely
from mmdit.errors import UserError
from mmdit.printable import logger, printable
from mmdit.registry import describe

log = logger(__name__)

# Image suffixes. Formats that we cannot decode are included, so they are reported, not ignored.
SUFFIXES = frozenset(
    (
        *(".apng", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif", ".jxl", ".psd", ".svg"),
    )
)
CHUNK = 1024  # images between two writes of the index


class FolderListing:
    """The image files of a folder: their paths relative to it, sorted.

    These are all files with an image suffix, in subfolders and behind links too, and all files
    that the captions mention. Hidden files are skipped. A folder that is also reached through
    links is visited once, under its own path if that is below `root`.

    Attributes:
        names: relative paths, with slashes.
        bad: paths with an image suffix that cannot be images, with the reason; not in `names`.

    Args:
        root: the folder.
        captions: where its captions come from.
        kinds: the kinds of captions to read.
    """

    def __init__(self, *, root: Path, captions: CaptionSource, kinds: Sequence[str]) -> None:
        if not root.is_dir():
            raise UserError(f"root {str(root)!r} must be a folder")
        self.root, self._kinds = root, tuple(kinds)
        self._captions, self._source = captions.open(root, self._kinds), describe(captions)
        self.bad: dict[str, str] = {}
        self._walked = set(self._walk())
        self.names: list[str] = sorted({*self._walked, *self._listed()})

    @property
    def files(self) -> int:
        """The number of image files found, usable or not."""
        return len(self.names) + len(self.bad)

    def read(self, name: str) -> tuple[bytes, Captions]:
        """The content of an image file and its captions.

        Raises:
            BadImage: one cannot be read, or there is no caption.
        """
        return self.content(name), self.captions(name)

    def content(self, name: str) -> bytes:
        """The content of an image file alone.

        Raises:
            BadImage: it cannot be read. If it does not exist, the message has the likely cause.
        """
        try:
            return read_bytes(self.root / name)
        except Missing as error:
            raise BadImage(self._not_there(name, "no such file")) from error

    def captions(self, name: str) -> Captions:
        """The captions of an image file alone.

        Raises:
            BadImage: it has none, or they cannot be read.
        """
        captions = self._captions(name)
        if not has_caption(captions, self._kinds):
            missing = f"has no caption of the kind {' or '.join(self._kinds)}"
            beside = self._captions.absence(name)
            raise BadImage(f"{missing}: {beside}" if beside else missing)
        return captions

    def identity(self) -> dict[str, Any]:
        """Plain data that identifies the listing: a hash of the names, and the caption source."""
        names = "\n".join(self.names).encode("utf-8", "surrogatepass")
        return {"files": hashlib.sha256(names).hexdigest()[:16], "captions": self._source}

    @functools.cached_property
    def _likely(self) -> Likely:
        return Likely(self._walked)

    def _walk(self) -> Iterator[str]:
        """Image files in all folders, each visited once: n linked folders have n! paths."""
        visited = set[tuple[int, int]]()
        folders, links = [""], list[str]()
        while folders or links:  # links last, by name: their target may have a path of its own
            below = folders.pop() if folders else heapq.heappop(links)
            try:
                status = os.stat(self.root / below)
                entries = list(os.scandir(self.root / below))
            except OSError as error:
                if not isinstance(error, PermissionError) and error.errno not in NOWHERE:
                    raise
                self.bad[below] = f"is a folder that cannot be listed ({error.strerror})"
                continue
            place = (status.st_dev, status.st_ino)
            if place in visited:
                continue
            visited.add(place)
            for entry in entries:
                name = posixpath.join(below, entry.name)
                looks_it = posixpath.splitext(entry.name)[1].lower() in SUFFIXES
                if entry.name.startswith("."):
                    continue
                if not _is_folder(entry):
                    if looks_it:
                        yield name
                    continue
                if looks_it:
                    self.bad[name] = "is a folder"
                if entry.is_symlink():
                    heapq.heappush(links, name)
                else:
                    folders.append(name)

    def _listed(self) -> Iterator[str]:
        for name in self._captions.listed:
            if name.startswith(("../", "/")) or name == "..":
                self.bad[name] = self._not_there(name, "lies outside of the folder")
            elif name not in self.bad:
                yield name

    def _not_there(self, name: str, problem: str) -> str:
        """The problem with a file that the captions mention, and its likely cause."""
        cause = self._likely.cause(name) if name in self._captions.listed else None
        return f"{problem}: {cause}" if cause else problem


class Folder(Files):
    """Images under a folder, each with captions.

    Every file is decoded once when the folder is opened, so that unusable files are found before
    the first step: they are set aside, counted, and listed in `report`. With `index`, opening an
    unchanged folder again decodes nothing, and an interrupted opening continues where it stopped.
    Above a few hundred thousand images use `mmdit.data.pack`.

    Args:
        root: the folder.
        captions: a `Sidecars`, `Table` or `ClassNames`.
        kinds: the kinds of captions to read.
        max_pixels: largest number of pixels in an image; larger images are set aside.
        max_bad_fraction: opening fails if a larger fraction of the images is set aside.
        report: JSON file that lists the images set aside, with reasons.
        index: file that caches sizes and checksums, keyed by name, length and modification time.
            It only saves time: the data set is the same without it.
        threads: number of threads that decode images.

    Raises:
        UserError: no image is usable, too many are bad, or a kind of caption never occurs.
    """

    def __init__(
        self,
        *,
        root: str,
        captions: CaptionSource,
        kinds: Sequence[str] = ("text",),
        max_pixels: int = MAX_PIXELS,
        max_bad_fraction: float = 0.02,
        report: str | None = None,
        index: str | None = None,
        threads: int = 8,
    ) -> None:
        check_limits(max_pixels=max_pixels, max_bad_fraction=max_bad_fraction, threads=threads)
        self.place = Path(root)
        self._listing = FolderListing(root=self.place, captions=captions, kinds=kinds)
        known = FolderIndex(Path(index) if index else None, max_pixels)
        good, bad, found = scan(self._listing, known, max_pixels=max_pixels, threads=threads)
        report_bad(
            bad,
            files=self._listing.files,
            place=self.place,
            report=Path(report) if report else None,
            limit=max_bad_fraction,
        )
        expect_kinds(kinds, found, root)
        self.names = list(good)
        self.sizes = np.array([(one.height, one.width) for one in good.values()], np.int32)
        self._sums = np.array(
            [(one.length, one.crc32) for one in good.values()], np.int64
        )  # (n, 2)

    def read(self, index: int) -> tuple[bytes, Captions]:
        data, captions = self._listing.read(self.names[index])
        if (len(data), zlib.crc32(data)) != self.checksum(index):
            raise BadImage("its content differs")
        return data, captions

    def checksum(self, index: int) -> tuple[int, int]:
        length, crc32 = self._sums[index].tolist()
        return length, crc32

    def stamp(self, index: int) -> str:
        """From the checksum recorded on opening, without reading the image; captions are read."""
        name = self.names[index]
        captions = self._listing.captions(name)
        if status_of(self._listing.root / name) is None:
            raise BadImage("no such file")
        return json.dumps([*self.checksum(index), captions], sort_keys=True)


image_folder = opener(Folder)


def scan(
    listing: FolderListing, known: FolderIndex, *, max_pixels: int, threads: int
) -> tuple[dict[str, Decoded], dict[str, str], set[str]]:
    """Decode every file: the good ones by name, reasons of the bad by name, kinds of captions."""

    def look(name: str) -> tuple[Decoded, Captions] | str:
        path = listing.root / name
        try:
            seen = known.get(name, path)
            if seen is None:
                status = status_of(path)  # before reading, so a change in between is noticed
                data = listing.content(name)
                height, width, _ = decode(data, max_pixels=max_pixels).shape
                changed = status[1] if status else 0
                seen = Decoded(len(data), changed, height, width, zlib.crc32(data))
                known.add(name, seen)
            return seen, listing.captions(name)
        except BadImage as error:
            return str(error)

    good: dict[str, Decoded] = {}
    several = 0
    bad, kinds = dict(listing.bad), set[str]()
    total, doing = len(listing.names), f"looking through {printable(listing.root.name)}"
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc=doing, unit="image", disable=None) as bar,
    ):
        for start in range(0, total, CHUNK):
            names = listing.names[start : start + CHUNK]
            for name, looked in zip(names, pool.map(look, names), strict=True):
                if isinstance(looked, str):
                    bad[name] = looked
                    continue
                good[name], captions = looked
                kinds.update(kind for kind, texts in captions.items() if texts)
                several += any(len(texts) > 1 for texts in captions.values())
            known.flush()
            bar.update(len(names))
    if several:
        log.info(
            "%s: images with several captions (each line of a .txt is one): %d; every step draws "
            "one of them",
            *(listing.root, several),
        )
    return good, bad, kinds


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except PermissionError:  # behind a link; listing it reports the reason
        return True
    except OSError as error:  # if it has an image suffix, reading it reports the reason
        if error.errno not in NOWHERE:
            raise
        return False
