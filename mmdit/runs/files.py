"""Files and folders of a run, as several machines see them."""

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path

from mmdit.atomic import claim, clear
from mmdit.errors import UserError

PATIENCE = 60.0  # seconds until files of another machine must be seen here


def make_empty(folder: Path, names: Iterable[str]) -> None:
    """Make a new folder with empty ones in it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True)


def remove(path: Path) -> None:
    """A folder with all that it holds; of a link, which may lead to another disk, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def unused(path: Path) -> Path:
    """`path`, or it with a number in front of its last suffix where it is taken."""
    numbered = (path.with_suffix(f".{number}{path.suffix}") for number in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())


class NumberedFiles:
    """Files `<number>-<name>` of a folder, which other processes may fill at the same time.

    Attributes:
        first: number of the first file that was added; 1 before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.first = folder, 1
        self._next, self._seen = 1, -1  # the number to try, and the folder's time when it was free
        clear(folder)

    def add(self, name: str, data: bytes, *, first: int | None = None) -> Path:
        """Write a file under the next free number, whole or not at all.

        Args:
            first: number to begin with; None is that after all files of the folder.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        with _alone(self.folder):
            number = self._free() if first is None else first
            while not claim(path := self.folder / f"{number:05d}-{name}", data):
                number += 1
            if first is None:
                if self._seen < 0:
                    self.first = number
                self._next, self._seen = number + 1, self.folder.stat().st_mtime_ns
        return path

    def _free(self) -> int:
        """The number after all others; looked for only where somebody else has been here."""
        if self._seen == self.folder.stat().st_mtime_ns:
            return self._next
        numbers = (re.match(r"\d+(?=-)", name) for name in os.listdir(self.folder))
        return max((int(found[0]) for found in numbers if found), default=0) + 1


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of the same block; not on file systems without locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sizes(paths: Iterable[Path], folder: Path) -> dict[str, int]:
    """Bytes of files, by their paths in `folder`."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


@contextlib.contextmanager
def writing(path: Path, run: Path) -> Iterator[None]:
    """Tell what to do where a file of a run cannot be written.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error}): {go_on(run)} when there is space and the "
            "folder can be written to"
        ) from error


def go_on(run: Path) -> str:
    """What to do to go on with a run that has ended; a stage is found again by its recipe."""
    stage = (run / "recipe.json").is_file()
    return "give the same command again" if stage else f"go on with resume={run}"


def await_file(path: Path, size: int) -> None:
    """Return when a file that a process wrote is seen here; network file systems take a moment.

    Raises:
        UserError: it does not appear.
    """
    deadline = time.monotonic() + PATIENCE
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} was written by another process and cannot be seen by the main one: the "
                "run folder must lie on a file system that all machines share (runs=<folder>)"
            )
        time.sleep(0.2)


def gigabytes(count: int) -> str:
    """1_500_000_000 -> '1.50 GB'."""
    return f"{count / 1e9:.2f} GB"
