"""File helpers for runs, whose folders several processes and machines may share."""

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

TIMEOUT = 60.0  # seconds until files written by another machine must be visible here


def make_empty(folder: Path, names: Iterable[str]) -> None:
    """Create a folder that contains only empty subfolders of these names."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True)


def remove(path: Path) -> None:
    """Remove a folder and its content; for a link, perhaps to another disk, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def unused(path: Path) -> Path:
    """`path`, or if it exists, `path` with a number inserted before its last suffix."""
    numbered = (path.with_suffix(f".{number}{path.suffix}") for number in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())


class NumberedFiles:
    """Files `<number>-<name>` in a folder to which other processes may add at the same time.

    Attributes:
        first: number of the first file added; 1 before that.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.first = folder, 1
        self._next, self._seen = 1, -1  # next number to try, and the folder's mtime then
        clear(folder)

    def add(self, name: str, data: bytes, *, first: int | None = None) -> Path:
        """Write a file under the next free number, atomically.

        Args:
            name: name of the file, without its number.
            data: its content.
            first: lowest number to try; None is the one after all files in the folder.

        Returns:
            Path of the file.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        with _exclusive(self.folder):
            number = self._free() if first is None else first
            while not claim(path := self.folder / f"{number:05d}-{name}", data):
                number += 1
            if first is None:
                if self._seen < 0:
                    self.first = number
                self._next, self._seen = number + 1, self.folder.stat().st_mtime_ns
        return path

    def _free(self) -> int:
        """The number after all others; the folder is listed only if another process changed it."""
        if self._seen == self.folder.stat().st_mtime_ns:
            return self._next
        numbers = (re.match(r"\d+(?=-)", name) for name in os.listdir(self.folder))
        return max((int(found[0]) for found in numbers if found), default=0) + 1


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Exclude other processes from the block; without effect on file systems without locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sizes(paths: Iterable[Path], folder: Path) -> dict[str, int]:
    """File sizes in bytes, by path relative to `folder`."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


@contextlib.contextmanager
def writing(path: Path, run: Path) -> Iterator[None]:
    """Turn an error of writing a run's file into a UserError that says how to go on.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error}): {how_to_go_on(run)} once there is space "
            "and the folder is writable"
        ) from error


def how_to_go_on(run: Path) -> str:
    """How to go on with a run that has ended, for messages; a stage is found by its recipe."""
    stage = (run / "recipe.json").is_file()
    return "give the same command again" if stage else f"go on with resume={run}"


def await_file(path: Path, size: int) -> None:
    """Wait until a file of another process is complete here; network file systems take a moment.

    Raises:
        UserError: it does not appear.
    """
    deadline = time.monotonic() + TIMEOUT
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} was written by another process, but the main one cannot see it: the run "
                "folder must be on a file system that all machines share (runs=<folder>)"
            )
        time.sleep(0.2)


def gigabytes(count: int) -> str:
    """1_500_000_000 -> '1.50 GB'."""
    return f"{count / 1e9:.2f} GB"
