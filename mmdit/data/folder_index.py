"""A cache of the sizes and checksums of decoded image files, so that a folder opens quickly."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.printable import logger

log = logger(__name__)


class Decoded(NamedTuple):
    """An image file at the time it was decoded.

    Attributes:
        length, changed: size in bytes, and modification time in nanoseconds.
        height, width: in pixels, after EXIF rotation.
        crc32: CRC-32 of its bytes.
    """

    length: int
    changed: int
    height: int
    width: int
    crc32: int


class FolderIndex:
    """Images decoded before, one JSON line each. Entries of files that have changed are ignored.

    Args:
        path: the index file; None keeps no index.
        max_pixels: entries made under a different limit are ignored.
    """

    def __init__(self, path: Path | None, max_pixels: int) -> None:
        self.path, self.max_pixels = path, max_pixels
        self._rows: dict[str, list[int]] = {}
        self._new: list[dict[str, Any]] = []
        if path is None or not path.is_file():
            return
        try:
            lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError as error:
            self._give_up(path, error)
            return
        for line in lines:
            try:
                row = json.loads(line)
                self._rows[row["file"]] = [int(number) for number in row["seen"]]
            except (ValueError, KeyError, TypeError):
                log.warning("%s: ignoring an incomplete line; its image is decoded again", path)

    def get(self, name: str, path: Path) -> Decoded | None:
        """The entry of a file, if its length and modification time have not changed."""
        limit, *seen = self._rows.get(name, [0])
        if limit != self.max_pixels or len(seen) != len(Decoded._fields):
            return None
        known = Decoded(*seen)
        return known if known[:2] == status_of(path) else None

    def add(self, name: str, seen: Decoded) -> None:
        self._new.append({"file": name, "seen": [self.max_pixels, *seen]})

    def flush(self) -> None:
        """Append the new entries to the file."""
        if self.path is not None and self._new:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="ascii") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in self._new))
            except OSError as error:
                self._give_up(self.path, error)
        self._new.clear()

    def _give_up(self, path: Path, error: OSError) -> None:
        """Go on without the index: it only saves time."""
        log.warning(
            "index %s cannot be used (%s), so images are decoded at every start: choose another "
            "file",
            path,
            error.strerror,
        )
        self.path = None


def status_of(path: Path) -> tuple[int, int] | None:
    """Length in bytes and modification time in nanoseconds; None if the file has no status."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # no such file, or an invalid name
        return None
    return status.st_size, status.st_mtime_ns
