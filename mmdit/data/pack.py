"""Pack a folder of captioned images into tar shards: `python -m mmdit.data.pack photos shards`.

Images are copied, not re-encoded. Each is decoded once; unusable images are set aside, counted and
listed in set_aside.json. Shard i contains the usable images of the i-th `per_shard` files by name,
so finished shards survive an interruption: the same command continues, and rejects a folder that
has changed. A sample's .json has the name of its file, so order and splits are those of the folder.
"""

import argparse
import contextlib
import fcntl
import io
import json
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from mmdit.atomic import clear, whole_file, write_atomically
from mmdit.checks import number, whole_number
from mmdit.data.bad_images import report_bad
from mmdit.data.buckets import Size
from mmdit.data.caption_sources import (
    Captions,
    CaptionSource,
    ClassNames,
    Sidecars,
    Table,
    check_mix,
    sidecar_suffix,
)
from mmdit.data.commands import add_options, command
from mmdit.data.folder import FolderListing
from mmdit.data.images import MAX_PIXELS, BadImage, decode, suffix_of
from mmdit.data.samples import ORIGIN
from mmdit.data.shard_index import AT_ONCE, ShardIndex, index_path, make_index
from mmdit.data.shards import PACKED
from mmdit.data.tar import state_of
from mmdit.errors import UserError
from mmdit.printable import printable, show

LOCK = ".lock"  # held by the process that writes to the folder


class Candidates(Protocol):
    """Images to pack, in a fixed order. `bad` has names known to be unusable, with reasons."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def bad(self) -> Mapping[str, str]: ...

    def read(self, name: str) -> tuple[bytes, Captions]:
        """The encoded image and its captions by kind. Raises BadImage."""

    def identity(self) -> Mapping[str, Any]:
        """Plain data that identifies the candidates and how they are read."""


class Checked(NamedTuple):
    """A decoded image, with the data that a shard stores about it."""

    name: str
    data: bytes
    captions: Captions
    size: Size


def pack(
    source: Candidates,
    out: Path,
    *,
    kinds: Sequence[str] = ("text",),
    per_shard: int = 1000,
    max_pixels: int = MAX_PIXELS,
    max_bad_fraction: float = 0.02,
    threads: int = 8,
) -> None:
    """Pack `source` into shards in the folder `out`, or continue an interrupted packing.

    Args:
        source: the images to pack.
        out: a new folder, or one where this packing was interrupted.
        kinds: the kinds of captions that the source reads.
        per_shard: number of source files per shard.
        max_pixels: largest number of pixels in an image; larger images are set aside.
        max_bad_fraction: packing stops if a larger fraction of the files is set aside.
        threads: number of threads that decode images.

    Raises:
        UserError: `out` has shards from another source or from files that have changed since,
            another process is packing into it, or too many images are bad.
    """
    whole_number("per_shard", per_shard)
    whole_number("threads", threads)
    whole_number("max_pixels", max_pixels)
    number("max_bad_fraction", max_bad_fraction, 0, below=1)
    names, bad = source.names, dict(source.bad)
    settings = {
        **source.identity(),
        "kinds": list(kinds),
        "per_shard": per_shard,
        "max_pixels": max_pixels,
    }
    files = len(names) + len(bad)

    def report() -> None:
        report_bad(
            bad,
            files=files,
            place=out,
            report=out / "set_aside.json",
            limit=max_bad_fraction,
        )

    with (
        _alone(out),
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=len(names), desc=f"packing {printable(out.name)}", unit="image", disable=None
        ) as bar,
    ):
        record = Record(out, settings)
        for start in range(0, len(names), per_shard):
            some = names[start : start + per_shard]
            tar = out / f"shard-{start // per_shard:06d}.tar"
            finished = record.finished(tar)
            if finished is None:
                bad_of_shard = _pack_shard(tar, source, some, start, max_pixels, pool, bar.update)
                record.add(tar, bad_of_shard)
            else:
                index, bad_of_shard = finished
                _check_shard(out, index, source, some, start, max_pixels, pool, bar.update)
            bad.update(bad_of_shard)
            if len(bad) > max_bad_fraction * files:
                report()  # raises, since the remaining files cannot lower the count
        report()
        record.complete()


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock `out` against other packing processes; create it if it does not exist.

    Raises:
        UserError: another process is packing into it, or it contains other files than shards.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} must be a folder")
    out.mkdir(parents=True, exist_ok=True)
    others = any(path.suffix != ".tmp" and path.name != LOCK for path in out.iterdir())
    if others and not (out / PACKED).is_file():
        raise UserError(f"{out} must be a new or empty folder, or have shards to continue")
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is packing into {out}: wait for it, or choose another folder"
            ) from error
        clear(out)
        yield


class Record:
    """The settings and progress of a packing: the file pack.json in its folder.

    Args:
        out: the folder.
        settings: the settings of the packing.

    Raises:
        UserError: the folder was packed with different settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, object]) -> None:
        self._path, self._shards = out / PACKED, dict[str, dict[str, Any]]()
        self._settings = settings
        if self._path.is_file():
            self._shards = self._read(out)
        else:
            self._write(complete=False)

    def finished(self, tar: Path) -> tuple[ShardIndex, dict[str, str]] | None:
        """The index of a finished shard, and the reasons of the images set aside, by name.

        None if the shard does not exist or has changed.
        """
        shard = self._shards.get(tar.name)
        if shard is None or not tar.is_file() or tar.stat().st_size != shard["bytes"]:
            return None
        index = ShardIndex.load(index_path(tar))
        if index is None or index.state != state_of(tar):
            return None
        return index, shard["bad"]

    def add(self, tar: Path, bad: Mapping[str, str]) -> None:
        """Record a finished shard."""
        self._shards[tar.name] = {"bytes": tar.stat().st_size, "bad": bad}
        self._write(complete=False)

    def complete(self) -> None:
        """Record that all shards are finished."""
        self._write(complete=True)

    def _read(self, out: Path) -> dict[str, dict[str, Any]]:
        try:
            before = json.loads(self._path.read_text(encoding="ascii"))
            shards = {
                name: {"bytes": int(shard["bytes"]), "bad": dict(shard["bad"])}
                for name, shard in before["shards"].items()
            }
            differing = [
                f"{key} {before.get(key)!r} then, {value!r} now"
                for key, value in self._settings.items()
                if before.get(key) != value
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self._path} is damaged: choose another folder") from error
        if differing:
            raise _packed_differently(out, "; ".join(differing))
        return shards

    def _write(self, *, complete: bool) -> None:
        record = {**self._settings, "complete": complete, "shards": self._shards}
        write_atomically(self._path, json.dumps(record, indent=1).encode())


def _packed_differently(out: Path, what: str) -> UserError:
    return UserError(
        f"{out} has shards packed differently ({what}): choose another folder, or move it away"
    )


def _check_shard(
    out: Path,
    index: ShardIndex,
    source: Candidates,
    names: Sequence[str],
    start: int,
    max_pixels: int,
    pool: Executor,
    progress: Callable[[int], object],
) -> None:
    """Compare a finished shard with its source as it is now, by checksums.

    Raises:
        UserError: an image or its captions have changed.
    """
    packed = {sample.key: sample for sample in index.samples}

    def difference(number: int) -> str | None:
        name, sample = names[number - start], packed.get(_key(number))
        try:
            data, captions = source.read(name)
            if sample is None:  # not stored, so only its usability can be compared
                decode(data, max_pixels=max_pixels)
        except BadImage as error:
            return None if sample is None else f"{name} {error}"
        if sample is None:
            return f"{name} was set aside before and is usable now"
        if sample.image[1:] != (len(data), zlib.crc32(data)):
            return f"the image {name} has changed"
        texts = {kind: zlib.crc32(text) for kind, text in _texts(captions).items()}
        if texts != {kind: span.crc32 for kind, span in sample.texts.items()}:
            return f"the captions of {name} have changed"
        return None

    for what in pool.map(difference, range(start, start + len(names))):
        if what is not None:
            raise _packed_differently(out, what)
        progress(1)


def _key(number: int) -> str:
    """The key of a sample, by its position in the source."""
    return f"{number:09d}"


def _texts(captions: Captions) -> dict[str, bytes]:
    """The contents of the caption files, by kind."""
    return {kind: "\n".join(texts).encode() for kind, texts in captions.items() if texts}


def _pack_shard(
    tar: Path,
    source: Candidates,
    names: Sequence[str],
    start: int,
    max_pixels: int,
    pool: Executor,
    progress: Callable[[int], object],
) -> dict[str, str]:
    """Write one tar file and its index; return the reasons of the images set aside, by name."""
    bad: dict[str, str] = {}
    sizes: dict[str, Size] = {}

    def look(name: str) -> Checked | str:
        try:
            data, captions = source.read(name)
            height, width, _ = decode(data, max_pixels=max_pixels).shape
            return Checked(name, data, captions, (height, width))
        except BadImage as error:
            return str(error)

    def usable() -> Iterator[tuple[str, Checked]]:
        for first in range(0, len(names), AT_ONCE):
            some = names[first : first + AT_ONCE]
            for i, seen in enumerate(pool.map(look, some), start + first):
                if isinstance(seen, str):
                    bad[names[i - start]] = seen
                    continue
                key = _key(i)
                sizes[key] = seen.size
                yield key, seen
            progress(len(some))

    write_tar(tar, usable())
    index = make_index(tar, max_pixels=max_pixels, pool=pool, measure=lambda key, _: sizes[key])
    index.save(index_path(tar))
    return bad


def write_tar(path: Path, samples: Iterable[tuple[str, Checked]]) -> None:
    """Write samples, by key, to a tar file, atomically.

    Equal samples give equal bytes: members have no times or owners.
    """
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for key, sample in samples:
            members = {
                f".{suffix_of(sample.data)}": sample.data,
                ".json": json.dumps({ORIGIN: sample.name}).encode(),
                **{sidecar_suffix(kind): t for kind, t in _texts(sample.captions).items()},
            }
            for suffix, data in members.items():
                member = tarfile.TarInfo(key + suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def pack_as_asked(source: Candidates, kinds: Sequence[str], given: argparse.Namespace) -> None:
    """Run `pack` with the options of a command, and print how to train on the shards."""
    pack(
        source,
        given.out,
        kinds=kinds,
        per_shard=given.per_shard,
        max_pixels=given.max_pixels,
        max_bad_fraction=given.max_bad_fraction,
        threads=given.threads,
    )
    show(f"{given.out} is complete: train with data=shards data.root={given.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command described in the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mmdit.data.pack", description="Pack a folder of captioned images."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="folder of shards; run again to continue")
    choices = ("sidecars", "table", "class_names")
    parser.add_argument("--captions", choices=choices, default="sidecars")
    parser.add_argument("--suffix", nargs="+", help="for sidecars: suffixes instead of .txt")
    parser.add_argument("--table", help="for table: the file (default: metadata.jsonl or .csv)")
    parser.add_argument("--template", default="a photo of a {}", help="for class_names")
    parser.add_argument("--names", help="for class_names: JSON file {folder: class}")
    parser.add_argument(
        "--kinds", nargs="+", default=["text"], help="kinds of captions: text synthetic"
    )
    parser.add_argument("--per-shard", type=int, default=1000, help="number of files per shard")
    add_options(parser)
    given = parser.parse_args(arguments)

    def body() -> None:
        captions: CaptionSource = Sidecars(suffix=given.suffix)
        if given.captions == "table":
            captions = Table(file=given.table)
        elif given.captions == "class_names":
            captions = ClassNames(template=given.template, names=given.names)
        kinds = tuple(check_mix(dict.fromkeys(given.kinds, 1.0)))
        pack_as_asked(
            FolderListing(root=given.folder, captions=captions, kinds=kinds), kinds, given
        )

    return command(body)


if __name__ == "__main__":
    sys.exit(main())
