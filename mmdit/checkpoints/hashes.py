"""Known hashes of files: where they come from, and whether the files still match them.

A file that we write states two hashes in its header's metadata: that of its content, under the key
that other programs use as well, and that of the header itself, the *seal*. A program that merges,
casts or edits a file may keep our metadata, which then describes other bytes. The seal shows this:

- We put the metadata last in the header. The safetensors library puts it first.
- The seal states the length of the header. Adding or removing an entry changes that.

If both are as we wrote them, no program has rewritten the file, and any difference is damage or an
edit in place. If they are not, another program has rewritten it, and the hashes that it kept mean
nothing.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.atomic import file_hash
from mmdit.errors import UserError
from mmdit.printable import logger

log = logger("mmdit.checkpoints")

HASH = "modelspec.hash_sha256"  # of all bytes after the header
SEAL = "mmdit.seal"  # length of the header, and its hash with zeros in place of the hash
NO_HASH = "0x" + 64 * "0"
NO_SEAL = f"{0:08d}-{64 * '0'}"


def sealed(header: dict[str, Any], length: int, content: str) -> bytes:
    """The text of a header with its hashes filled in for `NO_HASH` and `NO_SEAL`.

    Args:
        header: parsed header of a file, with `NO_HASH` and `NO_SEAL` in its metadata.
        length: length of its text, in bytes, which stays the same.
        content: SHA-256 of the bytes that follow the header.
    """
    metadata = dict(sorted(header["__metadata__"].items()))  # the library's order is random
    metadata |= {HASH: f"0x{content}", SEAL: f"{length:08d}-{64 * '0'}"}
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    complete = {**tensors, "__metadata__": metadata}
    text = json.dumps(complete, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(text) == length, "the hashes fill exactly the space reserved for them"
    digest = hashlib.sha256(text).hexdigest()
    return text.replace(metadata[SEAL].encode(), f"{length:08d}-{digest}".encode())


class Known(NamedTuple):
    """The hash that a file should have, known before its content is read."""

    sha256: str
    start: int  # first of the hashed bytes: 0, or the end of the header
    origin: str  # 'hub', 'seal', or 'header' if it may describe other bytes


def known_hash(path: Path, header: bytes | None) -> Known | None:
    """The hash that a file should have, from the hub's cache or its own header; None if unknown.

    Args:
        path: the file.
        header: text of a safetensors file's header; None for other files.

    Raises:
        UserError: we wrote the header, and it was changed in place.
    """
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return Known(blob.name, 0, "hub")
    if header is None:
        return None
    content = json.loads(header)
    metadata = content.get("__metadata__") or {}
    last = list(content)[-1:] == ["__metadata__"]
    ours = _is_sealed(path, header, last=last, metadata=metadata)
    stated = re.fullmatch(r"0x([0-9a-fA-F]{64})", str(metadata.get(HASH, "")))
    if not stated:
        return None
    return Known(stated[1].lower(), 8 + len(header), "seal" if ours else "header")


def expect(path: Path, known: Known, found: str) -> None:
    """Compare the hash of a file's content with the known one.

    Args:
        path: the file, for messages.
        known: the hash it should have.
        found: the hash it has.

    Raises:
        UserError: they differ. If the known one may describe other bytes, that is only a warning.
    """
    if found == known.sha256:
        return
    if known.origin == "hub":
        raise UserError(
            f"{path} is damaged: its SHA-256 is not {known.sha256[:16]}..., its name in the hub's "
            "cache. Download it again (`hf download --force-download`)"
        )
    if known.origin == "seal":
        raise UserError(
            f"{path} is damaged: its content is not what was written (its SHA-256 is not "
            f"{known.sha256[:16]}...). Copy or download it again"
        )
    log.warning(
        "%s: the hash in its header is not that of its content: it was merged, cast or edited by a "
        "program that kept the header, or is damaged. It cannot be verified",
        path,
    )


def verify_hash(path: Path, header: bytes | None) -> None:
    """Compare a file with its known hash, if there is one.

    Args:
        path: the file.
        header: text of a safetensors file's header; None for other files.

    Raises:
        UserError: the file does not match the hash in the hub's cache or in our own seal.
    """
    if (known := known_hash(path, header)) is None:
        log.debug("%s: it has no known hash, so it is not verified", path)
    else:
        expect(path, known, content_of(path, known.start))


def _is_sealed(path: Path, text: bytes, *, last: bool, metadata: dict[str, Any]) -> bool:
    """True if a header is as we wrote it, False if another program has rewritten it.

    Raises:
        UserError: it was changed in place.
    """
    if SEAL not in metadata or not last:
        return False
    seal = re.fullmatch(r"(\d{8})-([0-9a-f]{64})", str(metadata[SEAL]))
    if seal and int(seal[1]) != len(text):
        return False
    if not seal or hashlib.sha256(text.replace(seal[2].encode(), b"0" * 64)).hexdigest() != seal[2]:
        raise UserError(
            f"{path}: its header is not as it was written: it was edited, or is damaged. Copy or "
            "download it again (verify=false opens a public file as it is)"
        )
    return True


def content_of(path: Path, offset: int = 0) -> str:
    """SHA-256 of the bytes from `offset` on; an unchanged file is read once for all its models."""
    stat = path.stat()
    return content_hash(path, offset, stat.st_size, stat.st_mtime_ns)


@functools.cache
def content_hash(path: Path, offset: int, size: int, changed: int) -> str:
    """SHA-256 of the bytes from `offset` on; size and time of change are keys of the cache."""
    return file_hash(path, offset)
