"""Members of an uncompressed tar file, and where their contents lie in it."""

import os
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from mmdit.data.images import MAX_BYTES, BadImage
from mmdit.errors import UserError, first_line

TAIL = 2**16
MAX_EXTENDED = 2**20  # bytes of a header that holds a long name, or attributes
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

    Names are as they stand in the file, without a leading "./"; bytes that are not UTF-8 become
    surrogates, as in the names of files.

    Raises:
        UserError: it is compressed, cut off or damaged: `tarfile` alone would pass over all that
            comes after a damaged header.
    """
    found, length = [], path.stat().st_size
    try:
        with tarfile.open(path, "r:", encoding="utf-8", tarinfo=_Entry) as tar:
            for entry in tar:
                # Extended headers state sizes, too. A negative one would lead back for ever; that
                # of a file with holes counts them.
                left = length - entry.offset_data
                if entry.size < 0 or (entry.isreg() and not entry.issparse() and entry.size > left):
                    raise tarfile.ReadError(_wrong_size(entry, f"and {left} are left in the file"))
                if not entry.isdir():
                    found.append(_member(entry))
            end = tar.offset
    except RecursionError as error:
        raise UserError(f"{path}: thousands of extended headers follow each other") from error
    except (tarfile.TarError, ValueError, OverflowError) as error:
        problem = _compression(path) or first_line(error)
        raise UserError(f"{path} must be a whole, uncompressed tar file: {problem}") from error
    _check_end(path, end)
    return found


def state_of(path: Path) -> tuple[int, int]:
    """Length and CRC of the last bytes: change when entries are added, stay when it is copied."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        tail = _read(file, max(0, length - TAIL), TAIL)
    return length, zlib.crc32(tail)


class _Entry(tarfile.TarInfo):
    """An entry whose header is refused before anything is read or sought by the size it states."""

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
    """What is wrong with a file that begins as a compressed one."""
    with path.open("rb") as file:
        head = file.read(8)
    known = (name for magic, name in COMPRESSED.items() if head.startswith(magic))
    return next((f"it is compressed ({name}), so decompress it first" for name in known), None)


def _member(entry: tarfile.TarInfo) -> Member:
    problem = None
    if entry.issparse():
        problem = "is stored with holes"
    elif entry.issym() or entry.islnk():
        problem = "is a link"
    elif not entry.isreg():
        problem = "is not a regular file"
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
