"""Members of an uncompressed tar file, and where their contents lie in it."""

import os
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmdit.data.images import MAX_BYTES, BadImage
from mmdit.errors import UserError, first_line

TAIL = 2**16


class Span(NamedTuple):
    """Where the content of a member lies in its tar file, and its CRC."""

    offset: int
    length: int
    crc32: int

    def read(self, file: BinaryIO) -> bytes:
        """The content.

        Raises:
            BadImage: it is not what it was when the span was noted.
        """
        data = _read(file, self.offset, self.length)
        if len(data) != self.length or zlib.crc32(data) != self.crc32:
            raise BadImage("its bytes in the shard are others than when it was indexed")
        return data


class Member(NamedTuple):
    """An entry of a tar file. `problem`: why it has no content, such as being a link."""

    name: str
    offset: int
    length: int
    problem: str | None

    def read(self, file: BinaryIO) -> tuple[Span, bytes]:
        """Where its content lies, and the content.

        Raises:
            BadImage: it has none, or more than `MAX_BYTES`.
        """
        if self.problem:
            raise BadImage(f"{self.name} {self.problem}")
        if self.length > MAX_BYTES:
            raise BadImage(f"{self.length} bytes are more than the limit of {MAX_BYTES}")
        data = _read(file, self.offset, self.length)
        if len(data) != self.length:
            raise BadImage(f"{self.name} is cut off")
        return Span(self.offset, self.length, zlib.crc32(data)), data


def read_members(path: Path) -> list[Member]:
    """All entries of a tar file but the folders, in its order.

    Names are as they stand in the file, without a leading "./"; bytes that are no UTF-8 become
    surrogates, as in the names of files.

    Raises:
        UserError: it is compressed, cut off or damaged: `tarfile` alone would pass over all that
            comes after a damaged header.
    """
    found, last = [], -1
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for entry in tar:
                if entry.offset <= last:  # a negative length leads back: no end would come
                    raise tarfile.ReadError("an entry of negative length")
                last = entry.offset
                if not entry.isdir():
                    found.append(_member(entry))
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} must be a whole, uncompressed tar file: {first_line(error)}"
        ) from error
    _check_end(path, end)
    return found


def state_of(path: Path) -> tuple[int, int]:
    """Length and CRC of the last bytes: change when entries are added, stay when it is copied."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        tail = _read(file, max(0, length - TAIL), TAIL)
    return length, zlib.crc32(tail)


def _member(entry: tarfile.TarInfo) -> Member:
    problem = None
    if entry.issparse():
        problem = "is stored with holes"
    elif entry.issym() or entry.islnk():
        problem = "is a link"
    elif not entry.isreg():
        problem = "is no regular file"
    return Member(entry.name.removeprefix("./"), entry.offset_data, entry.size, problem)


def _check_end(path: Path, end: int) -> None:
    """Two blocks of zeros end a tar file, and nothing but zeros follows."""
    with path.open("rb") as file:
        file.seek(end)
        mark, rest = file.read(tarfile.BLOCKSIZE), file.read(2**20)
    if not mark:
        raise UserError(f"{path} must be a whole tar file: it has no end mark, so it was cut off")
    if any(mark):
        raise UserError(f"{path} must be a whole tar file: byte {end} begins no entry")
    if any(rest):
        raise UserError(f"{path} must be one tar file: another one follows its end mark")


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    """Without moving the file's position, so that threads may share it."""
    return os.pread(file.fileno(), length, offset)
