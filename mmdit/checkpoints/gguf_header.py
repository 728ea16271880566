"""Headers of GGUF files: read front to back, each length checked before it is believed.

A header has text entries, numbers and lists (the *metadata*), then name, shape, type and position
of each tensor. The shape is stated in reverse, the length of a row first. After it, from the next
multiple of the alignment, come the tensors, one after the other, each at a multiple of it.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3)
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.bounds import LONGEST_KEY, MOST_ENTRIES, MOST_TENSORS, MOST_WORDS
from mmdit.checkpoints.headers import TOO_MANY, Info, what_it_is
from mmdit.errors import UserError
from mmdit.nn.block_codes import BLOCK_TYPES

LONGEST_HEADER = 16 << 20  # bytes; with a vocabulary of T5, a public one has 1 MB
VERSIONS = (2, 3)
NUMBERS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
MOST_AXES = 4
LARGEST_AXIS = 1 << 40
# Types of tensors by their number in a file: those of plain numbers, and those of blocks.
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
PLAIN_BYTES = {"F32": 4, "F16": 2, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8, "BF16": 2}
FIRST = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
K_TYPES = {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
I_TYPES = {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"}
I_TYPES |= {22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
TYPES = {**PLAIN, **FIRST, **K_TYPES, **I_TYPES}
SHAPES = (
    "comfy.gguf.orig_shape."  # metadata key of the shape of a tensor that was stored in another
)


class Stored(NamedTuple):
    """A tensor in a GGUF file.

    Attributes:
        info: its shape and type.
        rows: number of rows as stored.
        start, end: its first byte, counted from the beginning of the file, and the one after it.
    """

    info: Info
    rows: int
    start: int
    end: int


class GGUFHeader(NamedTuple):
    """The header of a GGUF file.

    Attributes:
        metadata: its texts, numbers and short lists by key; vocabularies are left out.
        tensors: by name.
        data: the first byte after the header.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    data: int


class Cursor:
    """Reads numbers and texts of a header one after the other.

    Args:
        content: the beginning of the file.
        path: the file, for messages.
        size: its length in bytes.
    """

    def __init__(self, content: bytes, path: Path, size: int) -> None:
        self.content, self.path, self.size, self.at = content, path, size, 0

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            UserError: the header ends before, or is longer than any supported model needs.
        """
        if count > len(self.content) - self.at:
            if self.size > len(self.content):
                raise UserError(
                    f"{self.path} has a header of more than {LONGEST_HEADER:,} bytes, several "
                    "times what any supported model needs"
                )
            raise UserError(
                f"{self.path} is damaged: the file is cut off inside its header, at "
                f"{self.size:,} bytes; download it again"
            )
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, code: str) -> Any:
        """The next number, of a type as in `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self, most: int | None = None) -> str:
        """The next text, of at most so many bytes.

        Raises:
            UserError: it is longer, or is not UTF-8.
        """
        length = self.number("Q")
        if most is not None and length > most:
            raise self.damaged(f"a name has {length:,} characters")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None

    def damaged(self, how: str) -> UserError:
        """An error that says how the header is damaged."""
        return UserError(f"{self.path} has a damaged header ({how}): download or copy it again")


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file and check it against the size of the file.

    Raises:
        UserError: the file is cut off, is not a GGUF file of versions 2 or 3, or lists tensors of
            types that are not known, that overlap, or that the file does not hold.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(LONGEST_HEADER)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if content[:4] != b"GGUF":
        other = content[8:9] == b"{" and "it is a safetensors file under another name"
        raise UserError(f"{path} is not a GGUF file: {other or what_it_is(content[:512], size)}")
    cursor = Cursor(content, path, size)
    cursor.take(4)
    _expect_version(cursor)
    count, entries = cursor.number("Q"), cursor.number("Q")
    if count > MOST_TENSORS:
        raise UserError(f"{path} lists {TOO_MANY}")
    if entries > MOST_ENTRIES:
        raise cursor.damaged(f"its metadata has {entries:,} entries")
    metadata = _metadata(cursor, entries)
    alignment = metadata.get("general.alignment", 32)
    valid = type(alignment) is int and 8 <= alignment <= 1 << 16
    if not valid or alignment & (alignment - 1):
        raise cursor.damaged(f"its alignment is {alignment}")
    listed = [_listed(cursor) for _ in range(count)]
    data = cursor.at + -cursor.at % alignment
    tensors = _placed(cursor, listed, data, alignment)
    return GGUFHeader(metadata, _reshaped(cursor, tensors, metadata), data)


def _expect_version(cursor: Cursor) -> None:
    version = cursor.number("I")
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UserError(
            f"{cursor.path} is a GGUF file for processors of the other byte order: use the usual "
            "one, in little-endian order"
        )
    raise UserError(
        f"{cursor.path} is a GGUF file of version {version}; versions 2 and 3 are supported: "
        "convert it again with a current program"
    )


def _metadata(cursor: Cursor, entries: int) -> dict[str, Any]:
    """The entries of the metadata; of lists, those of at most eight numbers."""
    metadata: dict[str, Any] = {}
    words = 0
    for _ in range(entries):
        key, kind = cursor.text(LONGEST_KEY), cursor.number("I")
        if key in metadata:
            raise cursor.damaged(f"its metadata has {key!r} twice")
        if kind == TEXT:
            metadata[key] = cursor.text()
        elif kind in NUMBERS:
            metadata[key] = cursor.number(NUMBERS[kind])
        elif kind == LIST:
            inner, length = cursor.number("I"), cursor.number("Q")
            if inner == TEXT:
                words += length
                if words > MOST_WORDS:
                    raise cursor.damaged(f"its metadata has lists of {words:,} texts")
                for _ in range(length):
                    cursor.take(cursor.number("Q"))
                metadata[key] = None
            elif inner in NUMBERS:
                width = struct.calcsize(NUMBERS[inner])
                numbers = cursor.take(width * length)
                short = length <= 8
                metadata[key] = (
                    list(struct.unpack(f"<{length}{NUMBERS[inner]}", numbers)) if short else None
                )
            else:
                raise cursor.damaged(f"{key!r} is a list of the unknown type {inner}")
        else:
            raise cursor.damaged(f"{key!r} has the unknown type {kind}")
    return metadata


def _listed(cursor: Cursor) -> tuple[str, Info, int]:
    """Name, shape and type, and position of the next tensor in the list."""
    name = cursor.text(LONGEST_KEY)
    axes = cursor.number("I")
    if axes > MOST_AXES:
        raise cursor.damaged(f"{name!r} has {axes:,} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    number, position = cursor.number("I"), cursor.number("Q")
    if number not in TYPES:
        raise UserError(
            f"{cursor.path}: {name} is of the GGUF type {number}, which is not supported; "
            f"supported are {', '.join(TYPES.values())}"
        )
    if not all(0 < length <= LARGEST_AXIS for length in shape):
        raise cursor.damaged(f"{name!r} has the shape {list(shape)}")
    kind = TYPES[number]
    if kind in BLOCK_TYPES and (not shape or shape[-1] % BLOCK_TYPES[kind].values):
        raise cursor.damaged(
            f"{name!r} of shape {list(shape)} cannot be {kind}, in blocks of "
            f"{BLOCK_TYPES[kind].values} values"
        )
    return name, Info(shape, kind), position


def _placed(
    cursor: Cursor, listed: list[tuple[str, Info, int]], data: int, alignment: int
) -> dict[str, Stored]:
    """The tensors, each where the one before it ends.

    Raises:
        UserError: they overlap, leave gaps, or do not end with the file.
    """
    tensors: dict[str, Stored] = {}
    reached = data
    for name, info, position in sorted(listed, key=lambda item: item[2]):
        if name in tensors:
            raise cursor.damaged(f"{name!r} is listed twice")
        if position != reached - data:
            raise cursor.damaged(f"{name!r} overlaps another tensor, or is out of place")
        end = reached + stored_bytes(info)
        tensors[name] = Stored(info, math.prod(info.shape[:-1]), reached, end)
        reached = end + -end % alignment
    last = max((tensor.end for tensor in tensors.values()), default=data)
    if cursor.size < last:
        raise UserError(
            f"{cursor.path} is damaged: the file is cut off, with {cursor.size:,} bytes instead of "
            f"at least {last:,}; download it again"
        )
    if cursor.size > max(reached, data):
        raise UserError(f"{cursor.path} is damaged: it is longer than its header says")
    return {name: tensors[name] for name, _, _ in listed}


def stored_bytes(info: Info) -> int:
    """The number of bytes that a tensor takes in a GGUF file."""
    count = math.prod(info.shape)
    if info.dtype in PLAIN_BYTES:
        return count * PLAIN_BYTES[info.dtype]
    block = BLOCK_TYPES[info.dtype]
    return count // block.values * block.size


def _reshaped(
    cursor: Cursor, tensors: dict[str, Stored], metadata: dict[str, Any]
) -> dict[str, Stored]:
    """The tensors in the shapes that they had before they were stored in others."""
    for key, shape in metadata.items():
        if not key.startswith(SHAPES):
            continue
        name = key.removeprefix(SHAPES)
        integers = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        stored = tensors.get(name)
        if stored is None or not integers or math.prod(shape) != math.prod(stored.info.shape):
            raise cursor.damaged(f"{key!r} is {shape}, not a shape of a tensor in the file")
        tensors[name] = stored._replace(info=Info(tuple(shape), stored.info.dtype))
    return tensors
