"""A folder of images with captions as a training set."""

import functools
import hashlib
import heapq
import json
import os
import posixpath
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmdit.checks import expect_whole
from mmdit.data.aside import report_bad
from mmdit.data.caption_sources import Captions, CaptionSource
from mmdit.data.images import MAX_PIXELS, NOWHERE, BadImage, Missing, decode, read_bytes
from mmdit.data.known import Known, Seen, status_of
from mmdit.data.missing import Likely
from mmdit.data.source import CaptionedImages, has_caption
from mmdit.errors import UserError
from mmdit.printable import logger, printable
from mmdit.registry import describe

log = logger(__name__)

# What looks like an image: formats without a reader here are listed as bad, not overlooked.
SUFFIXES = frozenset(
    (
        *(".apng", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif", ".jxl", ".psd", ".svg"),
    )
)
CHUNK = 1024  # images between two writes of the index


class FolderFiles:
    """The files of a folder that are meant as images, by their paths relative to it, sorted.

    Those are the files with an image's suffix, subfolders and links included, and those that the
    captions speak of. Names that begin with a dot are not looked at. A folder that links lead to
    too counts once, under its own path if that is below `root`.

    Attributes:
        names: relative paths, with slashes.
        bad: what bears an image's name and cannot be one, with the reason. Not among `names`.

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
        walked = set(self._walk())
        self._likely = functools.cache(lambda: Likely(walked))
        self.names: list[str] = sorted({*walked, *self._listed()})

    @property
    def files(self) -> int:
        """How many images there could be."""
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
            BadImage: it cannot be read; where it is not there, with the likely cause.
        """
        try:
            return read_bytes(self.root / name)
        except Missing as error:
            raise BadImage(self._not_there(name, "no such file")) from error

    def captions(self, name: str) -> Captions:
        """The captions of an image file alone.

        Raises:
            BadImage: there is none, or it cannot be read.
        """
        captions = self._captions(name)
        if not has_caption(captions, self._kinds):
            told = f"has no caption of the kind {' or '.join(self._kinds)}"
            beside = self._captions.absence(name)
            raise BadImage(f"{told}: {beside}" if beside else told)
        return captions

    def identity(self) -> dict[str, Any]:
        """Which files there are, as a hash of their names, and where captions come from."""
        names = "\n".join(self.names).encode("utf-8", "surrogatepass")
        return {"files": hashlib.sha256(names).hexdigest()[:16], "captions": self._source}

    def _walk(self) -> Iterator[str]:
        """Image files in all folders, each visited once: links between n folders are n! ways."""
        visited = set[tuple[int, int]]()
        folders, links = [""], list[str]()
        while folders or links:  # links last, by name: what they lead to may have its own path
            below = folders.pop() if folders else heapq.heappop(links)
            try:
                status = os.stat(self.root / below)
                entries = list(os.scandir(self.root / below))
            except OSError as error:
                if not isinstance(error, PermissionError) and error.errno not in NOWHERE:
                    raise
                self.bad[below] = f"is a folder that may not be listed ({error.strerror})"
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

    def _not_there(self, name: str, told: str) -> str:
        """What is wrong with a name that the captions speak of, and why it may be."""
        cause = self._likely().cause(name) if name in self._captions.listed else None
        return f"{told}: {cause}" if cause else told


class ImageFolder(CaptionedImages):
    """Images under a folder, each with captions.

    Every file is decoded once when the data set is opened, so that what cannot be used is known
    before the first step: it is set aside, counted, and listed in `report`. `index` remembers what
    was decoded; with it, opening an unchanged folder again decodes nothing, and an interrupted
    opening goes on. Above some hundred thousand images use `mmdit.data.pack`.

    Args:
        split, validation_fraction, image_size, unit, max_ratio, crop, mix, samples, max_pixels,
            max_bad_fraction, seed: see `CaptionedImages`.
        root: the folder.
        captions: a `Sidecars`, `Table` or `ClassNames`.
        report: JSON file that lists what was set aside, and why.
        index: file that remembers sizes and checksums, by name, length and time of change. It is
            only an accelerator: without it the data set is the same.
        threads: that decode at once when the folder is opened.

    Raises:
        UserError: no image is left, more than `max_bad_fraction` are bad, a kind of the mix never
            occurs, or the split is empty.
    """

    def __init__(
        self,
        *,
        split: str,
        root: str,
        captions: CaptionSource,
        image_size: int,
        mix: Mapping[str, float] | None = None,
        samples: int | None = None,
        unit: int = 16,
        max_ratio: float = 4.0,
        crop: str = "random",
        validation_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        max_bad_fraction: float = 0.02,
        report: str | None = None,
        index: str | None = None,
        threads: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            split=split,
            validation_fraction=validation_fraction,
            image_size=image_size,
            unit=unit,
            max_ratio=max_ratio,
            crop=crop,
            mix=mix,
            samples=samples,
            max_pixels=max_pixels,
            max_bad_fraction=max_bad_fraction,
            seed=seed,
        )
        expect_whole("threads", threads, 1)
        self.root = Path(root)
        self._files = FolderFiles(root=self.root, captions=captions, kinds=tuple(self.mix))
        known = Known(Path(index) if index else None, max_pixels)
        seen, bad, kinds = scan(self._files, known, max_pixels=max_pixels, threads=threads)
        report_bad(
            bad,
            files=self._files.files,
            place=self.root,
            report=Path(report) if report else None,
            limit=max_bad_fraction,
        )
        for kind in self.mix:
            if kind not in kinds:
                raise UserError(f"mix: no image of {root} has a caption of the kind {kind!r}")
        kept = self._keep(
            list(seen), [(each.height, each.width) for each in seen.values()], self.root
        )
        contents = np.array([(each.length, each.crc32) for each in seen.values()], np.int64)
        self._contents = contents[kept]  # (n, 2)

    def read(self, index: int) -> tuple[bytes, Captions]:
        data, captions = self._files.read(self.names[index])
        if [len(data), zlib.crc32(data)] != self._contents[index].tolist():
            raise BadImage("its bytes are others")
        return data, captions

    def _picture(self, index: int) -> list[int]:
        length, crc32 = self._contents[index].tolist()
        return [length, crc32]

    def _stamp(self, index: int) -> str:
        name = self.names[index]
        try:
            captions = self._files.captions(name)
        except BadImage as error:
            raise self._changed(index, f": {error}") from error
        if status_of(self.root / name) is None:
            raise self._changed(index, ": no such file")
        return json.dumps([*self._picture(index), captions], sort_keys=True)


def scan(
    files: FolderFiles, known: Known, *, max_pixels: int, threads: int
) -> tuple[dict[str, Seen], dict[str, str], set[str]]:
    """Decode every file: name -> what the good ones are, name -> reason of the bad, kinds seen."""

    def look(name: str) -> tuple[Seen, Captions] | str:
        path = files.root / name
        try:
            seen = known.get(name, path)
            if seen is None:
                status = status_of(path)  # before reading: what changes meanwhile is not known
                data = files.content(name)
                height, width, _ = decode(data, max_pixels=max_pixels).shape
                changed = status[1] if status else 0
                seen = Seen(len(data), changed, height, width, zlib.crc32(data))
                known.add(name, seen)
            return seen, files.captions(name)
        except BadImage as error:
            return str(error)

    good: dict[str, Seen] = {}
    several = 0
    bad, kinds = dict(files.bad), set[str]()
    total, told = len(files.names), f"looking through {printable(files.root.name)}"
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc=told, unit="image", disable=None) as bar,
    ):
        for start in range(0, total, CHUNK):
            names = files.names[start : start + CHUNK]
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
            *(files.root, several),
        )
    return good, bad, kinds


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except PermissionError:  # of a link; listing it tells why
        return True
    except OSError as error:  # if it bears an image's name, reading it tells why
        if error.errno not in NOWHERE:
            raise
        return False
