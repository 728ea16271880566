"""Files and folders that appear whole or not at all, whenever their writer is killed.

What is being written lies in a hidden folder beside its place, `.<name>.<number>.tmp`, which holds

    lock        locked (flock) while its writer lives
    new         what will take the place
    old, place  where two folders cannot change places in one step: what was there, and where

The lock ends with its process, however that ends. So the next to write to the same place, or
`clear`, removes what nobody owns any more. On file systems without locks nothing is removed.
"""

import ctypes
import errno
import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LOCK, NEW, OLD, PLACE = "lock", "new", "old", "place"
SCRATCH = re.compile(r"\..+\.\d+\.tmp")
LONGEST = 200  # bytes of a name that is repeated in that of its scratch folder
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_held: set[int] = set()  # locks of this process


def _leave_to_parent() -> None:
    """In a forked process: a loader worker that outlives its parent must not hold its locks."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, held while the block runs and removed after it.

    Raises:
        OSError: it cannot be made; or what the block raises, naming `place` where the error is
            that of a file in the folder, or where the disk is full.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside, lock = _take(place)
        try:
            yield beside
        finally:
            try:
                with suppress(OSError):
                    _remove(beside)
            finally:
                _held.discard(lock)
                os.close(lock)
    except OSError as error:
        inside = str(error.filename).startswith(str(place.with_name(f".{_stem(place)}.")))
        if inside or (error.filename is None and error.errno in FULL):
            error.filename, error.filename2 = str(place), None
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears at `path` when the block ends well, or not at all."""
    with scratch(path) as beside:
        with (beside / NEW).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (beside / NEW).rename(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it to the disk, then move it there."""
    with whole_file(path) as file:
        file.write(data)


def claim(path: Path, data: bytes) -> bool:
    """Write a file where there is none, whole or not at all; whether the name was free.

    Of several processes that claim one name at once, one gets it.
    """
    if os.path.lexists(path):
        return False
    with scratch(path) as beside:
        with (beside / NEW).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return move_to_free(beside / NEW, path)


def move_to_free(source: Path, path: Path) -> bool:
    """Move a file to a name that nothing has; whether it was free."""
    try:
        os.link(source, path)
        source.unlink()
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links here: an empty file holds the name for a moment
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        source.rename(path)
        return True


def take_place(beside: Path, place: Path) -> None:
    """Put the folder `beside/new` in the place of another, which stays in `beside`.

    In one step where the system can do it. Where it cannot, a kill between two steps leaves the
    place empty, and the next to write there, or `clear`, puts the old folder back.
    """
    if not _exchange(beside / NEW, place):
        (beside / PLACE).write_bytes(os.fsencode(place.name))
        place.rename(beside / OLD)
        try:
            (beside / NEW).rename(place)
        except OSError:
            (beside / OLD).rename(place)
            raise


def clear(folder: Path) -> None:
    """Remove from a folder what killed processes left there while they wrote."""
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if SCRATCH.fullmatch(name)]
        for name in names:
            _clear(folder / name)


def flush(folder: Path) -> None:
    """Make what was made and renamed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take(place: Path) -> tuple[Path, int]:
    """Make and lock the scratch folder of the lowest free number, and clear those above it.

    Numbers, not names by chance: so leftovers are found without a look through the whole folder.
    """
    taken: tuple[Path, int] | None = None
    for number in itertools.count():
        folder = place.with_name(f".{_stem(place)}.{number}.tmp")
        there = os.path.lexists(folder)
        if there and (not _clear(folder) or taken):
            continue
        if taken:
            return taken
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        try:
            lock = _lock(folder)
        except OSError:
            folder.rmdir()
            raise
        if lock is not None:  # else it was taken for a leftover, before it was locked
            _held.add(lock)
            taken = folder, lock
    raise AssertionError("there is no end of numbers")


def _stem(place: Path) -> str:
    """What the names of a place's scratch folders begin with."""
    name = os.fsencode(place.name)
    return place.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()


def _lock(folder: Path, *, must: bool = False) -> int | None:
    """The open lock of a scratch folder; None if another process has it.

    Args:
        must: None, too, where the file system has no locks.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = os.fstat(lock).st_nlink == 0  # by one who held it until now
    except BlockingIOError:
        gone = True
    except OSError:
        gone = must
    if gone:
        os.close(lock)
        return None
    return lock


def _clear(folder: Path) -> bool:
    """Remove a scratch folder that nobody owns; whether nothing is there now."""
    try:
        names = os.listdir(folder)
        if folder.is_symlink() or (names and LOCK not in names):
            return False  # somebody else's
        lock = _lock(folder, must=True)
        if lock is None:
            return not os.path.lexists(folder)
        try:
            if (folder / OLD).is_dir():
                place = folder.with_name(os.fsdecode((folder / PLACE).read_bytes()))
                if not os.path.lexists(place):
                    (folder / OLD).rename(place)
            _remove(folder)
        finally:
            os.close(lock)
    except OSError:
        pass
    return not os.path.lexists(folder)


def _remove(folder: Path) -> None:
    """Remove a scratch folder, its lock last."""
    for item in folder.iterdir():
        if item.name != LOCK:
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, which Linux can on most file systems."""
    rename = _renameat2()
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(
        here, os.fsencode(one), here, os.fsencode(other), exchange
    )


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "renameat2", None)
