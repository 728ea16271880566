"""Explains why a file listed in a table is missing: finds the likely file and compares names."""

import posixpath
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

MOST = 100  # candidates kept per file name


class Likely:
    """Finds the file of a folder that a wrong name most likely refers to.

    Args:
        names: paths of all files, relative to the folder, with slashes.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_stem: dict[str, list[str]] = {}
        for name in names:
            alike = self._by_stem.setdefault(_stem(name), [])
            if len(alike) < MOST:
                alike.append(name)

    def cause(self, name: str) -> str | None:
        """How `name` differs from the name of the likely file; None if there is no such file.

        Names with the same fault get the same text, so that faults can be counted.
        """
        plain, faults = name, []
        for fault, changed in (
            ("it has backslashes instead of slashes", lambda text: text.replace("\\", "/")),
            ("it is URL-encoded", unquote),
            ("it has spaces around it", str.strip),
        ):
            if changed(plain) != plain:
                plain = changed(plain)
                faults.append(fault)
        plain = posixpath.normpath(plain)
        alike = self._by_stem.get(_stem(plain), [])
        if not alike:
            return None
        meant = max(alike, key=lambda other: _likeness(plain, other))
        return "; ".join([*faults, *_differences(plain, meant)])


def _likeness(name: str, other: str) -> tuple[int, bool]:
    """The number of trailing folders that two paths share, and whether the suffixes agree."""
    shared = 0
    for one, two in zip(name.split("/")[-2::-1], other.split("/")[-2::-1], strict=False):
        if _folded(one) != _folded(two):
            break
        shared += 1
    return shared, _folded(name).endswith(_folded(posixpath.splitext(other)[1]))


def _differences(name: str, meant: str) -> Iterable[str]:
    folder, file = posixpath.split(name)
    there, existing = posixpath.split(meant)
    folded, wanted = _folded(folder), _folded(there)
    if folded != wanted and not there:
        yield f"the folder {folder!r} is superfluous"
    elif folded != wanted and folded.endswith(f"/{wanted}"):
        yield f"the folder {folder[: -len(there) - 1] or '/'!r} is superfluous"
    elif folded != wanted and (not folder or wanted.endswith(f"/{folded}")):
        yield f"the folder {there[: len(there) - len(folder)].rstrip('/')!r} is missing"
    elif folded != wanted:
        yield f"it is in {there!r}"
    (stem, suffix), (existing_stem, existing_suffix) = map(posixpath.splitext, (file, existing))
    if _folded(suffix) != _folded(existing_suffix):
        yield f"the suffix there is {existing_suffix!r}"
        suffix = existing_suffix
    pairs = [(stem + suffix, existing_stem + existing_suffix)]
    pairs += [(folder, there)] if folded == wanted else []
    if any(_composed(one) != _composed(two) for one, two in pairs):
        yield "upper and lower case differ"
    elif any(one != two for one, two in pairs):
        yield "its accents are encoded differently (Unicode NFC and NFD)"


def _stem(name: str) -> str:
    return _folded(posixpath.splitext(posixpath.basename(name))[0])


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folded(text: str) -> str:
    """A key that ignores case and the encoding of accents."""
    return _composed(_composed(text).casefold())
