"""Unusable images: set aside, counted, listed in a report, and limited in number."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mmdit.atomic import write_atomically
from mmdit.checks import number, whole_number
from mmdit.errors import UserError
from mmdit.printable import logger

log = logger(__name__)


def check_limits(*, max_pixels: int, max_bad_fraction: float, threads: int) -> None:
    """Validate limits before any file is read."""
    whole_number("max_pixels", max_pixels, 1)
    number("max_bad_fraction", max_bad_fraction, 0, below=1)
    whole_number("threads", threads, 1)


def expect_kinds(kinds: Iterable[str], found: Collection[str], place: object) -> None:
    """Reject a mix with a kind of caption that no image of `place` has."""
    for kind in kinds:
        if kind not in found:
            raise UserError(f"mix: no image of {place} has a caption of the kind {kind!r}")


def report_bad(
    bad: Mapping[str, str], *, files: int, place: Path, report: Path | None, limit: float
) -> None:
    """Log how many of `files` were set aside, list them in `report`, and stop above `limit`.

    Args:
        bad: name -> reason.
        limit: largest allowed fraction of `files`.

    Raises:
        UserError: there are no files, none is usable, more than the limit are bad, or the report
            cannot be written.
    """
    share = len(bad) / files if files else 0.0
    if report is not None:
        record = {
            "protocol": "images-set-aside-1",
            "place": str(place),
            "files": files,
            "kept": files - len(bad),
            "set_aside": len(bad),
            "images": [{"file": name, "reason": bad[name]} for name in sorted(bad)],
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        # Names that are not UTF-8 contain surrogates, which are written as JSON escapes.
        try:
            write_atomically(report, text.encode(errors="backslashreplace"))
        except OSError as error:
            raise UserError(f"report {report} cannot be written: {error.strerror}") from error
    listed = f" (listed in {report})" if report else ""
    if not files:
        raise UserError(f"{place} has no images")
    if share > limit or len(bad) == files:
        raise UserError(
            f"{len(bad)} of {files} images of {place} cannot be used{listed}, more than "
            f"max_bad_fraction {limit} allows: {_causes(bad)}"
        )
    if bad:
        causes = _causes(bad)
        log.warning("%s: %d of %d images set aside%s: %s", place, len(bad), files, listed, causes)


def _causes(bad: Mapping[str, str], most: int = 3) -> str:
    """The most frequent causes, each with its first file and the number of files."""
    first: dict[str, str] = {}
    for name in sorted(bad):
        first.setdefault(bad[name], name)
    counts = Counter(bad.values())
    causes = sorted(first, key=lambda cause: (-counts[cause], first[cause]))
    described = [
        f"{first[cause]}: {cause}" + (f" ({counts[cause]} files)" if counts[cause] > 1 else "")
        for cause in causes[:most]
    ]
    more = len(causes) - most
    return "; ".join([*described, f"other causes: {more}"] if more > 0 else described)
