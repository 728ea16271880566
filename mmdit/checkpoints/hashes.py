"""Hashes that are known of files: what they are, and whether they still hold.

A file that we write states two in its header's metadata: that of its content, under the key that
other programs use as well, and that of the header itself. Whoever merges, casts or edits a file may
keep our metadata, which is then about other bytes. So the second tells whether they are still ours:

- We put the metadata last in the header. The safetensors library puts it first.
- The seal says how long the header was. Adding or removing an entry changes that.

Where both are as we left them, nobody wrote the file again, and what differs was damaged, or edited
in place. Where they are not, another program did, and what it kept is of no use.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.errors import UserError
from mmdit.printable import logger

log = logger("mmdit.checkpoints")

HASH = "modelspec.hash_sha256"  # of all bytes after the header
SEAL = "mmdit.seal"  # length of the header, and its hash while these digits are zeros
NO_HASH = "0x" + 64 * "0"
NO_SEAL = f"{0:08d}-{64 * '0'}"


def sealed(header: dict[str, Any], length: int, content: str) -> bytes:
    """The text of a header, which has `NO_HASH` and `NO_SEAL` in its metadata, with its hashes.

    Args:
        header: as it was read from a file.
        length: of its text.
        content: hash of what follows it.
    """
    metadata = dict(sorted(header["__metadata__"].items()))  # the library's order is random
    metadata |= {HASH: f"0x{content}", SEAL: f"{length:08d}-{64 * '0'}"}
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    whole = {**tensors, "__metadata__": metadata}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(text) == length, "the hashes have the length that was kept for them"
    digest = hashlib.sha256(text).hexdigest()
    return text.replace(metadata[SEAL].encode(), f"{length:08d}-{digest}".encode())


class Known(NamedTuple):
    """A hash that is known of a file before its content is read."""

    sha256: str
    start: int  # of the bytes that it is of: the whole file, or what follows the header
    origin: str  # 'hub', 'seal', or 'header' where it need not be of these bytes


def known_hash(path: Path, header: bytes | None) -> Known | None:
    """What hash is known of a file: by the hub's cache, or by its own header.

    Args:
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

    Raises:
        UserError: they differ. Where the known one may be of other bytes, that is only reported.
    """
    if found == known.sha256:
        return
    if known.origin == "hub":
        raise UserError(
            f"{path} is damaged: its SHA-256 is not {known.sha256[:16]}..., by which the hub's "
            "cache calls it. Download it again (`hf download --force-download`)"
        )
    if known.origin == "seal":
        raise UserError(
            f"{path} is damaged: its content is not what was written (its SHA-256 is not "
            f"{known.sha256[:16]}...). Copy or download it again"
        )
    log.warning(
        "%s: its header states the hash of other content: it was merged, cast or edited by a "
        "program that kept the header, or is damaged. There is nothing to compare it with",
        path,
    )


def verify_hash(path: Path, header: bytes | None) -> None:
    """Compare a file with the hash that is known of it, if one is.

    Args:
        header: as in `known_hash`.

    Raises:
        UserError: the file is not what the hub's cache or our own seal says.
    """
    if (known := known_hash(path, header)) is None:
        log.debug("%s: no hash is known that it could be compared with", path)
    else:
        expect(path, known, content_of(path, known.start))


def _is_sealed(path: Path, text: bytes, *, last: bool, metadata: dict[str, Any]) -> bool:
    """Whether a header is as we wrote it; not, if another program wrote it again.

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
            "download it again (of a public file, verify=false opens it as it is)"
        )
    return True


def content_of(path: Path, offset: int = 0) -> str:
    """SHA-256 of what follows `offset`; read once for the five models of one unchanged file."""
    stat = path.stat()
    return content_hash(path, offset, stat.st_size, stat.st_mtime_ns)


@functools.cache
def content_hash(path: Path, offset: int, size: int, changed: int) -> str:
    """SHA-256 of what follows `offset` in a file of that size and time of change."""
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").hexdigest()
