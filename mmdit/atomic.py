"""Atomic writes: a file or folder appears completely or not at all, even if its writer is killed.

Data are written to a hidden scratch folder next to the target, `.<name>.<number>.tmp`, containing

    lock        locked (flock) while its writer lives
    new         what will replace the target
    old, place  the previous target and its name, on systems that cannot exchange two folders

The lock is released when its process ends, for any reason. The next process that writes to the same
target, or `clear`, then removes the abandoned folder. On file systems without locks, abandoned
folders are not removed.
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
LONGEST = 200  # bytes; the scratch folder of a longer name uses its hash instead
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_held: set[int] = set()  # file descriptors of locks that this process holds


def _leave_to_parent() -> None:
    """Release the locks in a forked process: a data-loader worker may outlive its parent."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A new scratch folder next to `place`, locked while the block runs and removed afterwards.

    Raises:
        OSError: it cannot be created; or as raised by the block, but naming `place` if the error
            is about a file in the scratch folder, or if the disk is full.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside, lock = _new_scratch(place)
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
    """A file to write to; it appears at `path` only if the block ends without an error."""
    with scratch(path) as beside:
        with (beside / NEW).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (beside / NEW).rename(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file to a scratch folder, flush it to disk, then move it to `path`."""
    with whole_file(path) as file:
        file.write(data)


def claim(path: Path, data: bytes) -> bool:
    """Write a file atomically if `path` does not exist; returns whether it was written.

    If several processes claim the same name at once, exactly one succeeds.
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
    """Move a file to `path` if that does not exist; returns whether it was moved."""
    try:
        os.link(source, path)
        source.unlink()
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links here: reserve the name with an empty file
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        source.rename(path)
        return True


def replace_folder(beside: Path, place: Path) -> None:
    """Replace the folder `place` by `beside/new`; the previous one stays in `beside`.

    This is one step if the system supports it. If not, a kill between two steps leaves no folder
    at `place`, and the next process that writes there, or `clear`, restores the previous one.
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
    """Remove scratch folders that killed processes left in a folder."""
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if SCRATCH.fullmatch(name)]
        for name in names:
            _clear(folder / name)


def file_hash(path: Path, start: int = 0) -> str:
    """SHA-256 of a file, in hexadecimal.

    Args:
        start: number of bytes at its beginning that are left out.
    """
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """Flush a folder's entries to disk, so that files created or renamed survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _new_scratch(place: Path) -> tuple[Path, int]:
    """Create and lock the scratch folder with the lowest free number, and clear those above it.

    Numbers rather than random names: abandoned ones are found without listing the whole folder.
    """
    created: tuple[Path, int] | None = None
    for number in itertools.count():
        folder = place.with_name(f".{_stem(place)}.{number}.tmp")
        there = os.path.lexists(folder)
        if there and (not _clear(folder) or created):
            continue
        if created:
            return created
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        try:
            lock = _lock(folder)
        except OSError:
            folder.rmdir()
            raise
        if lock is not None:  # else another process cleared it before it was locked
            _held.add(lock)
            created = folder, lock
    raise AssertionError("there is no end of numbers")


def _stem(place: Path) -> str:
    """The target's part of the names of its scratch folders."""
    name = os.fsencode(place.name)
    return place.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()


def _lock(folder: Path, *, must: bool = False) -> int | None:
    """Lock a scratch folder and return the descriptor; None if another process holds it.

    Args:
        must: return None, too, if the file system has no locks.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = os.fstat(lock).st_nlink == 0  # removed by its previous owner
    except BlockingIOError:
        gone = True
    except OSError:
        gone = must
    if gone:
        os.close(lock)
        return None
    return lock


def _clear(folder: Path) -> bool:
    """Remove a scratch folder that no process holds; returns whether it is gone."""
    try:
        names = os.listdir(folder)
        if folder.is_symlink() or (names and LOCK not in names):
            return False  # not created by this module
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
    """Remove a scratch folder, with its lock as the last file."""
    for item in folder.iterdir():
        if item.name != LOCK:
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, which Linux supports on most file systems."""
    rename = _renameat2()
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(
        here, os.fsencode(one), here, os.fsencode(other), exchange
    )


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "renameat2", None)
