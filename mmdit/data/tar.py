"""Members of an uncompressed tar file, with the offsets of their contents."""

import os
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from mmdit.data.images import MAX_BYTES, BadImage
from mmdit.errors import UserError, first_line

TAIL = 2**16
MAX_EXTENDED = 2**20  # bytes of an extended header (long names, attributes)
EXTENDED = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class Span(NamedTuple):
    """The position of a member's content in its tar file, and its CRC-32."""

    offset: int
    length: int
    crc32: int

    def read(self, file: BinaryIO) -> bytes:
        """The content.

        Raises:
            BadImage: it has changed since it was indexed.
        """
        data = _read(file, self.offset, self.length)
        if len(data) != self.length or zlib.crc32(data) != self.crc32:
            raise BadImage("its content in the shard has changed since it was indexed")
        return data


class Member(NamedTuple):
    """An entry of a tar file. `problem` says why it has no content, e.g. because it is a link."""

    name: str
    offset: int
    length: int
    problem: str | None

    def read(self, file: BinaryIO) -> tuple[Span, bytes]:
        """The span of its content, and the content.

        Raises:
            BadImage: it has no content, is truncated, or is larger than `MAX_BYTES`.
        """
        if self.problem:
            raise BadImage(f"{self.name} {self.problem}")
        if self.length > MAX_BYTES:
            raise BadImage(f"{self.length} bytes are more than the limit of {MAX_BYTES}")
        data = _read(file, self.offset, self.length)
        if len(data) != self.length:
            raise BadImage(f"{self.name} is truncated")
        return Span(self.offset, self.length, zlib.crc32(data)), data


def read_members(path: Path) -> list[Member]:
    """All entries of a tar file except folders, in file order.

    Names are those in the file without a leading "./"; bytes that are not UTF-8 become surrogates,
    as in file names.

    Raises:
        UserError: it is compressed, truncated or damaged. (`tarfile` alone would silently skip
            everything after a damaged header.)
    """
    found, length = [], path.stat().st_size
    try:
        with tarfile.open(path, "r:", encoding="utf-8", tarinfo=_Entry) as tar:
            for entry in tar:
                # Extended headers also state sizes. A negative one would loop forever; the size
                # of a sparse file includes its holes.
                left = length - entry.offset_data
                if entry.size < 0 or (entry.isreg() and not entry.issparse() and entry.size > left):
                    raise tarfile.ReadError(_wrong_size(entry, f"and {left} are left in the file"))
                if not entry.isdir():
                    found.append(_member(entry))
            end = tar.offset
    except RecursionError as error:
        raise UserError(f"{path} is damaged: thousands of consecutive extended headers") from error
    except (tarfile.TarError, ValueError, OverflowError) as error:
        problem = _compression(path) or first_line(error)
        raise UserError(f"{path} must be a complete, uncompressed tar file: {problem}") from error
    _check_end(path, end)
    return found


def state_of(path: Path) -> tuple[int, int]:
    """Length, and CRC of the last bytes: changes when entries are added, not when it is copied."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        tail = _read(file, max(0, length - TAIL), TAIL)
    return length, zlib.crc32(tail)


class _Entry(tarfile.TarInfo):
    """An entry whose stated size is validated before it is used to read or seek."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        entry = super().frombuf(buf, encoding, errors)
        if not 0 <= entry.size < 2**62:
            raise tarfile.ReadError(_wrong_size(entry, "which no file has"))
        if entry.type in EXTENDED and entry.size > MAX_EXTENDED:
            raise tarfile.ReadError(_wrong_size(entry, "too many for an extended header"))
        return entry


def _wrong_size(entry: tarfile.TarInfo, why: str) -> str:
    return f"the header of {entry.name!r} states {entry.size} bytes, {why}"


def _compression(path: Path) -> str | None:
    """The error message for a compressed file, or None."""
    with path.open("rb") as file:
        head = file.read(8)
    formats = (name for magic, name in COMPRESSED.items() if head.startswith(magic))
    return next((f"it is compressed ({name}), so decompress it first" for name in formats), None)


def _member(entry: tarfile.TarInfo) -> Member:
    problem = None
    if entry.issparse():
        problem = "is a sparse file"
    elif entry.issym() or entry.islnk():
        problem = "is a link"
    elif not entry.isreg():
        problem = "is not a regular file"
    return Member(entry.name.removeprefix("./"), entry.offset_data, entry.size, problem)


def _check_end(path: Path, end: int) -> None:
    """Check that a tar file ends in a block of zeros followed by nothing but zeros."""
    with path.open("rb") as file:
        file.seek(end)
        mark, rest = file.read(tarfile.BLOCKSIZE), file.read(2**20)
    if not mark:
        raise UserError(f"{path} must be a complete tar file: it has no end mark, so is truncated")
    if any(mark):
        raise UserError(f"{path} must be a complete tar file: no entry starts at byte {end}")
    if any(rest):
        raise UserError(f"{path} must be a single tar file: more data follows its end mark")


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    """Read without moving the file's position, so that threads can share it."""
    return os.pread(file.fileno(), length, offset)
