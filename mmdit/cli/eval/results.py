"""Files of results, which no other evaluation overwrites."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from mmdit.atomic import claim, write_atomically


def write_new(out: Path, name: str, files: Mapping[str, bytes]) -> list[Path]:
    """Write files `<name><ending>`, each whole or not at all.

    Where results of that name are there already, or are being written by another process, all of
    them become `<name>-2<ending>`, and so on; the same results again stay where they are.

    Args:
        files: content by ending, as '.json'; the first decides whose the name is.
    """
    first, *others = files
    for number in count(1):
        stem = name if number == 1 else f"{name}-{number}"
        paths = {ending: out / f"{stem}{ending}" for ending in files}
        taken = [p for ending, p in paths.items() if p.exists() and not _same(p, files[ending])]
        ours = not taken and (
            claim(paths[first], files[first]) or _same(paths[first], files[first])
        )
        if ours:
            break
    for ending in others:
        write_atomically(paths[ending], files[ending])
    return list(paths.values())


def _same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
