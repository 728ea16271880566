"""Headers of safetensors files, and the tensors after them, read from front to back.

Public files are memory-mapped and never read as a whole (`mmdit.checkpoints.archive`). The files of
a run are copied to memory: each byte is read once, and hashed on the way.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmdit.bounds import LONGEST_JSON, LONGEST_KEY, MOST_ENTRIES, MOST_TENSORS, parse_json
from mmdit.errors import UserError, first_line

LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
PIECE = 1 << 22  # bytes read and hashed at a time, small enough for the processor's cache
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
TOO_MANY = (
    f"more than {MOST_TENSORS:,} tensors, which is more than any supported model has: "
    "it is damaged, or was not made in good faith"
)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Info(NamedTuple):
    """Shape and dtype of a tensor, as the header states them."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F16, BF16, F8_E4M3, ...


class Header(NamedTuple):
    """The parsed header of a safetensors file."""

    infos: dict[str, Info]
    metadata: dict[str, str]
    offsets: dict[str, tuple[int, int]]  # first byte and end of each tensor, after the header
    text: bytes  # JSON; in the file, eight bytes with its length come before it

    @property
    def raw(self) -> bytes:
        """All bytes before the tensors."""
        return struct.pack("<Q", len(self.text)) + self.text


class Digest(Protocol):
    """A hash object of `hashlib`, which is fed with bytes."""

    def update(self, data: memoryview, /) -> None: ...


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the size of the file.

    Raises:
        UserError: the file is cut off, or is not a safetensors file; the message says what it
            seems to be instead.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if not 2 <= length <= LONGEST_HEADER or start[8:9] != b"{":
                raise UserError(f"{path} is not a safetensors file: {what_it_is(start, size)}")
            if length > LONGEST_JSON:
                raise UserError(
                    f"{path} has a header of {length:,} bytes; {LONGEST_JSON:,} is several times "
                    "what any supported model needs"
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    needed = 8 + length
    if size >= needed:
        try:
            header = _parsed(text)
            needed += max((end for _, end in header.offsets.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f" ({first_line(error)})" if isinstance(error, ValueError) else ""
            raise UserError(
                f"{path} has a damaged header{reason}: download or copy it again"
            ) from None
        if len(header.infos) > MOST_TENSORS:
            raise UserError(f"{path} lists {TOO_MANY}")
    if size < needed:
        raise UserError(
            f"{path} is damaged: the file is cut off, with {size:,} bytes instead of at least "
            f"{needed:,}; download it again"
        )
    return header


def _parsed(text: bytes) -> Header:
    """The header that this JSON states.

    Raises:
        Exception: it is not JSON, or does not describe tensors.
    """
    tensors = parse_json(text)
    stated = tensors.pop("__metadata__", None)
    metadata = {} if stated is None else {k: str(v) for k, v in stated.items()}
    infos = {k: Info(tuple(v["shape"]), str(v["dtype"])) for k, v in tensors.items()}
    offsets = {k: (v["data_offsets"][0], v["data_offsets"][1]) for k, v in tensors.items()}
    if len(metadata) > MOST_ENTRIES:
        raise ValueError(f"its metadata has {len(metadata):,} entries")
    if (longest := max(map(len, infos), default=0)) > LONGEST_KEY:
        raise ValueError(f"a tensor's name has {longest:,} characters")
    return Header(infos, metadata, offsets, text)


def read_tensors(path: Path, header: Header, digest: Digest) -> dict[str, Tensor]:
    """Copy all tensors of a file to memory, hashing them on the way.

    Args:
        path: a safetensors file.
        header: its header.
        digest: is updated with every byte after the header, in order.

    Returns:
        The tensors by key, in the order of the header.

    Raises:
        UserError: the header does not describe the bytes that follow it.
        OSError: the file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    reached = 0
    with path.open("rb") as file:
        file.seek(8 + len(header.text))
        for key, (start, end) in sorted(header.offsets.items(), key=lambda item: item[1]):
            shape, dtype = header.infos[key].shape, DTYPES.get(header.infos[key].dtype)
            valid = all(isinstance(n, int) and n >= 0 for n in shape)
            if not valid or dtype is None or start != reached:
                raise _contradicted(path, key)
            if end - start != math.prod(shape) * dtype.itemsize:
                raise _contradicted(path, key)
            tensors[key] = torch.empty(shape, dtype=dtype)
            content = tensors[key].reshape(-1).view(torch.uint8).numpy().data
            for at in range(0, end - start, PIECE):
                piece = content[at : at + PIECE]
                if file.readinto(piece) != len(piece):
                    raise _contradicted(path, key)
                digest.update(piece)
            reached = end
        if file.read(1):
            raise UserError(f"{path} is damaged: it is longer than its header says")
    return {key: tensors[key] for key in header.infos}


def _contradicted(path: Path, key: str) -> UserError:
    return UserError(
        f"{path} is damaged: {key} has another position or size than its header states"
    )


def what_it_is(start: bytes, size: int) -> str:
    """What a file probably is whose first bytes are not those of its format."""
    head = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; the download asked for a login or failed"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickle (.ckpt, .pt) under another name"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file under another name: let its name end in .gguf"
    if size == 0:
        return "it is empty"
    return f"its first bytes are not a header ({size:,} bytes); download or copy it again"
