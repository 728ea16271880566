"""Files by a pattern with braces and wildcards: `cc12m-{000000..000009}.tar`, `*.tar`."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mmdit.errors import UserError
from mmdit.printable import logger

log = logger(__name__)

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 1_000_000  # names of one pattern
LIKE_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def expand(pattern: str) -> Iterator[str]:
    """All that braces stand for: `{a,b}` is a and b, `{08..10}` is 08, 09 and 10.

    Raises:
        UserError: braces of another kind, left open, or of more than a million names.
    """
    found = BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"pattern {pattern!r} has a brace without its other half")
        yield pattern
        return
    for choice in _choices(pattern, found.group(1)):
        yield from expand(pattern[: found.start()] + choice + pattern[found.end() :])


def find(root: Path, pattern: str) -> list[Path]:
    """Files below `root`, sorted; names that begin with a dot are not looked at.

    Args:
        root: the folder.
        pattern: relative to it, with slashes; braces as in `expand`, wildcards as in a shell. A
            file of just this name is meant itself.

    Raises:
        UserError: a file that the pattern names is not there, or none is.
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
            f"{root} has no {', '.join(missing[:3])}{more}: {len(missing)} files that the pattern "
            f"{pattern!r} names are not there"
        )
    if not found:
        raise UserError(f"{root} holds no {pattern}")
    for path in found:
        if not path.is_file():
            raise UserError(f"{path} must be a regular file")
    return sorted(found)


def find_shards(root: Path) -> list[Path]:
    """All *.tar of a folder, sorted. A warning names what looks like a shard and is not among them.

    Raises:
        UserError: there is none.
    """
    others = sorted(
        path.relative_to(root).as_posix()
        for level in ("*", "*/*")
        for path in root.glob(level)
        if path.name.lower().endswith(LIKE_SHARDS) and not path.name.startswith(".")
        if path.is_file() and (path.parent != root or path.suffix != ".tar")
    )
    hint = (
        f"not read, though they look like shards: {', '.join(others[:3])}"
        f"{' and more' if len(others) > 3 else ''} (uncompressed *.tar of the folder itself are, "
        "or those that data.shards='*/*.tar' names)"
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
        raise UserError(f"pattern {pattern!r}: {{{inside}}} must run upwards, to {MOST} at most")
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{len(first)}d}"
