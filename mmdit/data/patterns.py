"""File patterns with braces and wildcards: `cc12m-{000000..000009}.tar`, `*.tar`."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mmdit.errors import UserError
from mmdit.printable import logger

log = logger(__name__)

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 1_000_000  # names from one pattern
LIKE_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def expand(pattern: str) -> Iterator[str]:
    """Expand braces: `{a,b}` to a and b, `{08..10}` to 08, 09 and 10.

    Raises:
        UserError: a brace is unmatched or malformed, or stands for more than a million names.
    """
    found = BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"pattern {pattern!r} has an unmatched brace")
        yield pattern
        return
    for choice in _choices(pattern, found.group(1)):
        yield from expand(pattern[: found.start()] + choice + pattern[found.end() :])


def find(root: Path, pattern: str) -> list[Path]:
    """The files below `root` that match a pattern, sorted; hidden files are skipped.

    Args:
        root: the folder.
        pattern: relative to it, with slashes; braces as in `expand`, wildcards as in a shell. If
            a file of exactly this name exists, it is the only match.

    Raises:
        UserError: a file that the pattern names does not exist, or nothing matches.
    """
    if not root.is_dir():
        raise UserError(f"root {str(root)!r} must be a folder")
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise UserError(f"pattern {pattern!r} must be relative to root {str(root)!r} and below it")
    if (root / pattern).is_file():
        return [root / pattern]
    found, missing = set[Path](), []
    for name in expand(pattern):
        if any(character in name for character in "*?["):
            found.update(path for path in root.glob(name) if not path.name.startswith("."))
        elif (root / name).exists():
            found.add(root / name)
        else:
            missing.append(name)
    if missing:
        more = " and more" if len(missing) > 3 else ""
        raise UserError(
            f"{root} has no {', '.join(missing[:3])}{more}: {len(missing)} files of the pattern "
            f"{pattern!r} are missing"
        )
    if not found:
        raise UserError(f"{root} has no files that match {pattern}")
    for path in found:
        if not path.is_file():
            raise UserError(f"{path} must be a regular file")
    return sorted(found)


def find_shards(root: Path) -> list[Path]:
    """All *.tar of a folder, sorted. Warns about other files that look like shards.

    Raises:
        UserError: there are none.
    """
    others = sorted(
        path.relative_to(root).as_posix()
        for level in ("*", "*/*")
        for path in root.glob(level)
        if path.name.lower().endswith(LIKE_SHARDS) and not path.name.startswith(".")
        if path.is_file() and (path.parent != root or path.suffix != ".tar")
    )
    hint = (
        f"ignoring files that look like shards: {', '.join(others[:3])}"
        f"{' and more' if len(others) > 3 else ''} (only uncompressed *.tar directly in the folder "
        "are read, or those that match data.shards='*/*.tar')"
    )
    try:
        shards = find(root, "*.tar")
    except UserError as error:
        if not others:
            raise
        raise UserError(f"{error}; {hint}") from error
    if others:
        log.warning("%s: %s", root, hint)
    return shards


def _choices(pattern: str, inside: str) -> Iterator[str]:
    if "," in inside:
        yield from inside.split(",")
        return
    ends = RANGE.fullmatch(inside)
    if ends is None:
        raise UserError(f"pattern {pattern!r}: braces must be like {{000..009}} or {{a,b}}")
    first, last = ends.groups()
    if not 0 <= int(last) - int(first) < MOST:
        raise UserError(
            f"pattern {pattern!r}: {{{inside}}} must be ascending, with at most {MOST} names"
        )
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{len(first)}d}"
