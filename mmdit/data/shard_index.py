"""What lies where in tar shards, so that each sample is one seek away.

An uncompressed tar file holds samples in WebDataset's layout: members of one sample share the name
up to the first dot. One is an image; `.txt` and `.<kind>.txt` are captions, one a line, and so are
the strings in `.json`. Each image is decoded once, what cannot be used is noted with the reason,
and the index is written beside the tar file, as JSON lines. It follows from the tar file alone: who
loses it makes it again.
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
AT_ONCE = 64  # samples in memory


class ShardIndex(NamedTuple):
    """The samples of a tar file in its order, and the keys of those set aside with the reason.

    Attributes:
        state: length and end of the tar file, by which it is known again.
        limit: pixels above which an image was refused; None if none was.
    """

    state: tuple[int, int]
    limit: int | None
    bad: Mapping[str, str]
    samples: Sequence[Sample]

    def save(self, path: Path) -> None:
        """Write a header and one line for each sample; the file appears whole or not at all."""
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
        """None if there is none, or none that `save` wrote whole."""
        try:
            with path.open(encoding="ascii") as file:
                header, lines = json.loads(file.readline()), list(file)
            if header["protocol"] != PROTOCOL:
                raise ValueError("it is of another protocol")
            if header["samples"] != len(lines) or header["sha256"] != _sha256(lines):
                raise ValueError("it is not as it was written")
            samples = [Sample.of(json.loads(line)) for line in lines]
            return cls((*header["state"],), header["limit"], header["bad"], samples)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be used, and is made again: %s", path, first_line(error))
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
    """The name, relative to `root`, and the index of each tar file, known or made now.

    An index is made anew when its tar file has another length or end, and when it leaves out images
    that `max_pixels` allows. What was indexed before an interruption is not indexed again.

    Args:
        paths: tar files below `root`.
        root: the folder.
        folder: where the indices lie; else each beside its tar file.
        max_pixels: of an image; larger ones are set aside.
        threads: that decode at once.

    Raises:
        UserError: tar files are compressed, cut off or damaged. How much of them is lost cannot be
            known, so no limit on images set aside could be kept. Raised at the end, with all.
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
    """Where the index of a tar file lies: beside it."""
    return tar.with_suffix(".index.jsonl")


def make_index(
    path: Path,
    *,
    max_pixels: int,
    pool: Executor,
    measure: Measure | None = None,
    progress: Callable[[int], object] | None = None,
) -> ShardIndex:
    """Look through a tar file.

    Args:
        path: the tar file.
        max_pixels: of an image; larger ones are set aside.
        pool: of threads that decode.
        measure: gives the size of an image that was decoded before; else it is decoded.
        progress: called with the bytes that were looked through.

    Raises:
        UserError: it is compressed, cut off, damaged or changes meanwhile.
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
    # Only some at a time, so that an interruption does not wait for all.
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
        raise UserError(f"{path} changes while it is read: wait until it is written")
    return ShardIndex(state, limit, bad, samples)


def _is_of(index: ShardIndex, path: Path, max_pixels: int) -> bool:
    """Whether it tells all of the tar file as it is now that `max_pixels` allows."""
    return index.state == state_of(path) and (index.limit is None or index.limit >= max_pixels)


def _save(index: ShardIndex, target: Path) -> None:
    try:
        index.save(target)
    except OSError as error:  # a folder that is only read: the data set is the same without
        log.warning(
            "%s cannot be written (%s), so the shard is looked through at every start: give "
            "another folder for indices",
            target,
            first_line(error),
        )
