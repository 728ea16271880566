"""What is remembered of image files that were decoded before, so that a folder opens at once."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.printable import logger

log = logger(__name__)


class Decoded(NamedTuple):
    """What an image file was when it was decoded.

    Attributes:
        length, changed: bytes, and the time of change in nanoseconds.
        height, width: in pixels, upright.
        crc32: of its bytes.
    """

    length: int
    changed: int
    height: int
    width: int
    crc32: int


class FolderIndex:
    """Images decoded before, one JSON line each: a file that changed is not known.

    Args:
        path: the file; None remembers nothing.
        max_pixels: what was found under another limit is not known.
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
                log.warning("%s: a line that was not written whole is decoded anew", path)

    def get(self, name: str, path: Path) -> Decoded | None:
        """What is known of a file that has the length and time of change of then."""
        limit, *seen = self._rows.get(name, [0])
        if limit != self.max_pixels or len(seen) != len(Decoded._fields):
            return None
        known = Decoded(*seen)
        return known if known[:2] == status_of(path) else None

    def add(self, name: str, seen: Decoded) -> None:
        self._new.append({"file": name, "seen": [self.max_pixels, *seen]})

    def flush(self) -> None:
        """Append what is new."""
        if self.path is not None and self._new:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="ascii") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in self._new))
            except OSError as error:
                self._give_up(self.path, error)
        self._new.clear()

    def _give_up(self, path: Path, error: OSError) -> None:
        """It only saves time: the data set is the same without."""
        log.warning(
            "index %s cannot be used (%s), so images are decoded at every start: name another file",
            path,
            error.strerror,
        )
        self.path = None


def status_of(path: Path) -> tuple[int, int] | None:
    """Length in bytes and time of change in nanoseconds; None if it cannot be found out."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # no file, or a name that none can have
        return None
    return status.st_size, status.st_mtime_ns
