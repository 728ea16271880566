"""Result files that are never overwritten by another evaluation."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from mmdit.atomic import claim, write_atomically


def write_new(out: Path, name: str, files: Mapping[str, bytes]) -> list[Path]:
    """Write files `<name><ending>`, each atomically.

    If other results with this name exist, or another process is writing them, all files become
    `<name>-2<ending>`, and so on; equal results are not written twice.

    Args:
        out: an existing folder.
        name: first part of the files' names.
        files: content by ending, such as '.json'; the first file claims the name.

    Returns:
        The paths, in the order of `files`.
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
