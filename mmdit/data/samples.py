"""Samples of a tar file: groups its members by key and reads their captions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from mmdit.data.buckets import Size
from mmdit.data.caption_sources import columns_of, kind_of, lines_of, object_of
from mmdit.data.folder import SUFFIXES
from mmdit.data.images import BadImage
from mmdit.data.tar import Member, Span

ORIGIN = "packed_from"  # key in a sample's .json: the name of the file it was packed from

Measure: TypeAlias = Callable[[str, bytes], Size]  # key and image -> height, width


class Sample(NamedTuple):
    """One usable sample of a tar file.

    Attributes:
        key: name of its members up to the first dot.
        origin: name of the file it was packed from, if recorded.
        height, width: of the image in pixels, after EXIF rotation.
        image: span of the image.
        texts: spans of the caption files by kind, one caption per line.
        table: span of the .json.
        columns: the kinds of captions in the .json.
    """

    key: str
    origin: str | None
    height: int
    width: int
    image: Span
    texts: Mapping[str, Span]
    table: Span | None
    columns: Sequence[str]

    @property
    def kinds(self) -> set[str]:
        """The kinds of captions it has."""
        return {*self.texts, *self.columns}

    @classmethod
    def of(cls, row: list[Any]) -> "Sample":
        """The inverse of JSON's view of a sample, which is a list of its attributes."""
        key, origin, height, width, image, texts, table, columns = row
        return cls(
            key=key,
            origin=origin,
            height=height,
            width=width,
            image=Span(*image),
            texts={kind: Span(*span) for kind, span in texts.items()},
            table=Span(*table) if table else None,
            columns=columns,
        )


def group(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Members by key (the path up to the first dot of the file name), in file order.

    The members of a sample need not be adjacent. Hidden files, names without a dot, and
    WebDataset's own metadata (`__name__`) are skipped.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if stem and dot and not member.name.startswith("__"):
            groups.setdefault(folder + slash + stem, []).append(member)
    return groups


def look(path: Path, key: str, members: Sequence[Member], measure: Measure) -> Sample:
    """Read the members of one key as a sample, with all its captions, whichever are used later.

    Args:
        path: the tar file.
        key: name of the members up to the first dot.
        members: all members of the key.
        measure: returns the size of an image.

    Raises:
        BadImage: there is not exactly one image, or a member cannot be read.
    """
    by_suffix: dict[str, Member] = {}
    for member in members:
        suffix = member.name[len(key) :]
        if suffix.endswith(".TXT"):  # read like .txt, as in a folder of images
            suffix = f"{suffix[:-4]}.txt"
        if suffix in by_suffix:
            raise BadImage(f"has two {suffix} under one key")
        by_suffix[suffix] = member
    images = [member for suffix, member in by_suffix.items() if suffix.lower() in SUFFIXES]
    if len(images) != 1:
        raise BadImage(f"has {len(images)} images under one key, not one: {', '.join(by_suffix)}")
    texts, table, columns, origin = dict[str, Span](), None, list[str](), None
    with path.open("rb") as file:
        image, data = images[0].read(file)
        height, width = measure(key, data)
        for suffix, member in by_suffix.items():
            if kind := kind_of(suffix):
                span, data = member.read(file)
                if lines_of(data, suffix):
                    texts[kind] = span
            elif suffix == ".json":
                table, data = member.read(file)
                row = object_of(data, suffix)
                origin = _origin(row)
                columns = [kind for kind in columns_of(row) if kind.isidentifier()]
    return Sample(key, origin, height, width, image, texts, table, columns)


def _origin(row: dict[str, Any]) -> str | None:
    name = row.pop(ORIGIN, None)
    try:
        return name if isinstance(name, str) and name.encode("utf-8", "surrogateescape") else None
    except UnicodeEncodeError:
        return None
