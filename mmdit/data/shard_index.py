"""Indices of tar shards, so that reading a sample takes one seek.

An uncompressed tar file contains samples in WebDataset's layout: the members of a sample share
their name up to the first dot. One is an image; `.txt` and `.<kind>.txt` are captions, one per
line, and so are the strings in `.json`. Each image is decoded once, unusable samples are recorded
with the reason, and the index is written beside the tar file as JSON lines. It depends on the tar
file alone, so it can be deleted and is created again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mmdit.atomic import write_atomically
from mmdit.data.buckets import Size
from mmdit.data.images import MAX_PIXELS, BadImage, TooLarge, decode
from mmdit.data.samples import Measure, Sample, group, look
from mmdit.data.tar import read_members, state_of
from mmdit.errors import UserError, first_line
from mmdit.printable import logger, printable

log = logger(__name__)

PROTOCOL = "mmdit-shard-index-3"
AT_ONCE = 64  # samples in memory at a time


class ShardIndex(NamedTuple):
    """The samples of a tar file in file order, and the keys of unusable ones with the reason.

    Attributes:
        state: length and CRC of the end of the tar file, to detect changes (`state_of`).
        limit: the limit on pixels that excluded an image; None if it excluded none.
        bad: key -> reason of each unusable sample.
        samples: the usable samples.
    """

    state: tuple[int, int]
    limit: int | None
    bad: Mapping[str, str]
    samples: Sequence[Sample]

    def save(self, path: Path) -> None:
        """Write a header and one line per sample, atomically."""
        lines = [json.dumps(sample) + "\n" for sample in self.samples]
        header = {
            "protocol": PROTOCOL,
            "state": self.state,
            "limit": self.limit,
            "bad": self.bad,
            "samples": len(self.samples),
            "sha256": _sha256(lines),
        }
        write_atomically(path, "".join([json.dumps(header) + "\n", *lines]).encode())

    @classmethod
    def load(cls, path: Path) -> "ShardIndex | None":
        """Read an index; None if it does not exist, is damaged, or has another protocol."""
        try:
            with path.open(encoding="ascii") as file:
                header, lines = json.loads(file.readline()), list(file)
            if header["protocol"] != PROTOCOL:
                raise ValueError("it has another protocol")
            if header["samples"] != len(lines) or header["sha256"] != _sha256(lines):
                raise ValueError("it is damaged")
            samples = [Sample.of(json.loads(line)) for line in lines]
            return cls((*header["state"],), header["limit"], header["bad"], samples)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be used and is created again: %s", path, first_line(error))
            return None


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def index_shards(
    paths: Sequence[Path],
    *,
    root: Path,
    folder: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    threads: int = 8,
) -> Iterator[tuple[str, ShardIndex]]:
    """Yield the name, relative to `root`, and the index of each tar file; create missing indices.

    An index is created again if its tar file has changed, or if it excludes images that
    `max_pixels` allows. Shards indexed before an interruption are not indexed again.

    Args:
        paths: tar files below `root`.
        root: the folder.
        folder: folder of the indices; by default each is beside its tar file.
        max_pixels: largest number of pixels in an image; larger images are set aside.
        threads: number of threads that decode images.

    Raises:
        UserError: tar files are compressed, truncated or damaged. The number of images lost in
            them is unknown, so the limit on bad images cannot apply. Raised once, at the end.
    """
    damaged: list[str] = []
    total = sum(path.stat().st_size for path in paths)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=total,
            desc=f"indexing {printable(root.name)}",
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        for path in paths:
            name, end = path.relative_to(root), bar.n + path.stat().st_size
            target = index_path(folder / name if folder else path)
            index = ShardIndex.load(target)
            if index is None or not _is_of(index, path, max_pixels):
                try:
                    index = make_index(path, max_pixels=max_pixels, pool=pool, progress=bar.update)
                except UserError as error:
                    damaged.append(str(error))
                    continue
                _save(index, target)
            bar.update(end - bar.n)
            yield name.as_posix(), index
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(paths)} shards cannot be read: {'; '.join(damaged[:3])}"
        )


def index_path(tar: Path) -> Path:
    """The path of the index of a tar file: beside it."""
    return tar.with_suffix(".index.jsonl")


def make_index(
    path: Path,
    *,
    max_pixels: int,
    pool: Executor,
    measure: Measure | None = None,
    progress: Callable[[int], object] | None = None,
) -> ShardIndex:
    """Index a tar file.

    Args:
        path: the tar file.
        max_pixels: largest number of pixels in an image; larger images are set aside.
        pool: thread pool that decodes images.
        measure: returns the known size of an image; by default images are decoded.
        progress: called with the number of bytes read since the last call.

    Raises:
        UserError: it is compressed, truncated or damaged, or changes while it is read.
    """

    def decoded(_: str, data: bytes) -> Size:
        height, width, _ = decode(data, max_pixels=max_pixels).shape
        return height, width

    def looked(key: str) -> Sample | BadImage:
        try:
            return look(path, key, groups[key], measure or decoded)
        except BadImage as error:
            return error

    state = state_of(path)
    groups = group(read_members(path))
    names = list(groups)
    bad: dict[str, str] = {}
    samples, limit = [], None
    # In small portions, so that an interruption does not wait for all.
    for start in range(0, len(groups), AT_ONCE):
        keys = names[start : start + AT_ONCE]
        for key, seen in zip(keys, pool.map(looked, keys), strict=True):
            if isinstance(seen, Sample):
                samples.append(seen)
                continue
            bad[key] = str(seen)
            limit = max_pixels if isinstance(seen, TooLarge) else limit
        if progress is not None:
            progress(sum(member.length for key in keys for member in groups[key]))
    if state_of(path) != state:
        raise UserError(f"{path} changed while it was read: wait until it is complete")
    return ShardIndex(state, limit, bad, samples)


def _is_of(index: ShardIndex, path: Path, max_pixels: int) -> bool:
    """Whether an index matches the tar file as it is now, and has all that `max_pixels` allows."""
    return index.state == state_of(path) and (index.limit is None or index.limit >= max_pixels)


def _save(index: ShardIndex, target: Path) -> None:
    try:
        index.save(target)
    except OSError as error:  # a read-only folder: the index only saves time
        log.warning(
            "%s cannot be written (%s), so the shard is indexed at every start: choose another "
            "folder for indices",
            target,
            first_line(error),
        )
