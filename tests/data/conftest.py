"""Small image files, good and bad."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG file by hand, so that what it says does not depend on a library that writes it."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (b"IHDR" + header, *extra, b"IDAT" + zlib.compress(rows), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def bomb() -> bytes:
    """A header that promises 2.5 billion pixels."""
    return png(50_000, 50_000, 8, 2, b"\0" * 1000)


@pytest.fixture
def photo() -> Callable[..., Path]:
    """`photo(path, caption, height=, width=, seed=)` writes a PNG file and its sidecar."""

    def write(
        path: Path, caption: str | None, *, height: int = 8, width: int = 8, seed: int = 0
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(height, width, seed)))
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
        return path

    return write


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **about: object) -> None:
    """Add a member; `about`: attributes of its header."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in about.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def tar_of(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of regular members, in the order given; names may repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path
