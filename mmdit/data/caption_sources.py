"""Captions of image folders: where they are read from, and how one of several is chosen.

An image has captions by kind: `{"text": ("a dog", "a brown dog"), "synthetic": ("A small ...",)}`.
A mix such as the paper's `{"text": 0.5, "synthetic": 0.5}` (Sec. 5.2.2) gives the frequency of each
kind. A caption source is opened once per folder, for the kinds of the mix:
`source.open(root, kinds)` returns a reader, and `reader(name)` the captions of one file.
"""

import codecs
import csv
import io
import itertools
import json
import posixpath
import re
import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from mmdit.checks import expect, listed, mapping, number
from mmdit.data.images import MAX_BYTES, NOWHERE, BadImage, read_bytes
from mmdit.errors import UserError, first_line
from mmdit.registry import register

T = TypeVar("T")
Captions: TypeAlias = Mapping[str, Sequence[str]]
# Sidecar suffixes of other programs, suggested where an image has no caption.
OTHER_SIDECARS = (".txt", ".caption", ".captions", ".cap", ".tags", ".text", ".md", ".json")
TABLES = ("metadata.jsonl", "metadata.csv")


class Reader(Protocol):
    """Captions of one folder. Picklable, like the data set that holds it."""

    @property
    def listed(self) -> Collection[str]:
        """Names of the files that the source lists; empty if it has no list."""

    def __call__(self, name: str) -> Captions:
        """Captions by kind of the file at `name`, relative to the folder, with slashes.

        Raises:
            BadImage: they cannot be read. A file without captions gets an empty mapping.
        """

    def absence(self, name: str) -> str | None:
        """Why a file has no captions: where they were looked for, and what was found instead."""


class CaptionSource(Protocol):
    """How an image folder keeps its captions."""

    def open(self, root: Path, kinds: Sequence[str]) -> Reader: ...


@register
class Sidecars:
    """`photo.txt` beside `photo.jpg`: each line is a caption of the kind "text".

    Captions of another kind are in `photo.<kind>.txt`, e.g. `photo.synthetic.txt`. `.TXT` is read
    if there is no `.txt`.

    Args:
        suffix: replaces the image's suffix, e.g. ".caption". Of several, the first that exists is
            used, e.g. [".jpg.txt", ".png.txt"] for `photo.jpg.txt`. None is ".txt".
    """

    def __init__(self, *, suffix: str | Sequence[str] | None = None) -> None:
        if suffix is not None and not isinstance(suffix, str):
            listed("captions.suffix", suffix)
        self._suffixes = tuple([suffix] if isinstance(suffix, str) else suffix or [".txt"])
        for each in self._suffixes:
            plain = isinstance(each, str) and re.fullmatch(r"(\.[^./\\\0]+)+", each)
            expect(bool(plain), "captions.suffix", each, "must be a suffix, such as .caption")
            expect(
                each.lower() != ".json",
                "captions.suffix",
                each,
                "must be a suffix of plain text files",
            )

    def open(self, root: Path, kinds: Sequence[str]) -> Reader:
        return _SidecarReader(root, kinds, self._suffixes)


class _SidecarReader:
    """Reads captions from files beside the images of `root`."""

    listed: Collection[str] = ()

    def __init__(self, root: Path, kinds: Sequence[str], suffixes: Sequence[str]) -> None:
        self._root, self._kinds, self._suffixes = root, kinds, suffixes

    def __call__(self, name: str) -> Captions:
        found: dict[str, tuple[str, ...]] = {}
        for kind, sidecar in self._places(name):
            if kind not in found and _is_file(sidecar):
                found[kind] = lines_of(read_bytes(sidecar), sidecar.name)
        return found

    def absence(self, name: str) -> str | None:
        if any(_is_file(sidecar) for _, sidecar in self._places(name)):
            return "the file beside it is empty"
        wanted = ", ".join(
            suffix if kind == "text" else f".{kind}{suffix}"
            for kind, suffix in itertools.product(self._kinds, self._suffixes)
        )
        missing = f"no file with the suffix {wanted} beside it"
        path = self._root / name
        for suffix in (*OTHER_SIDECARS, *(path.suffix + other for other in OTHER_SIDECARS)):
            if not _is_file(path.with_suffix(suffix)):
                continue
            if suffix.endswith(".json"):
                return f"{missing}, but one with {suffix}: convert these to a metadata.jsonl"
            how = f"data.captions.suffix={suffix} (when packing: --suffix {suffix})"
            return f"{missing}, but one with {suffix}: read it with {how}"
        return f"{missing}; data/captions=constant gives all images one caption"

    def _places(self, name: str) -> Iterator[tuple[str, Path]]:
        """Kind and path of each file that may hold captions of an image."""
        stem = (self._root / name).with_suffix("")
        for kind, suffix in itertools.product(self._kinds, self._suffixes):
            for case in (suffix, suffix.upper()):
                marked = case if kind == "text" else f".{kind}{case}"
                yield kind, stem.with_name(f"{stem.name}{marked}")


@register
class Table:
    """One table for the folder: JSON lines, or CSV with a header.

    `file_name` is relative to the folder; every other column that the mix names is a kind of
    caption: a string, or in JSON also a list of strings. An image may have several lines; their
    captions are combined. Errors name the line.

    Args:
        file: the table, relative to the folder; by default metadata.jsonl or metadata.csv.
    """

    def __init__(self, *, file: str | None = None) -> None:
        self.file = file

    def open(self, root: Path, kinds: Sequence[str]) -> Reader:
        path = self._path(root)
        captions: dict[str, dict[str, list[str]]] = {}
        for place, row in table_rows(path, ("file_name", *kinds)):
            name = row.get("file_name")
            if "file_name" not in row:
                keys = ", ".join(list(row)[:20]) or "none"
                raise UserError(f"{place}: must have a 'file_name'; its keys are {keys}")
            if not isinstance(name, str):
                raise UserError(f"{place}: file_name {name!r} must be the name of a file")
            entry = captions.setdefault(posixpath.normpath(name), {})
            for kind in kinds:
                entry.setdefault(kind, []).extend(_texts(row.get(kind), f"{place}: {kind}"))
        return _TableReader(captions)

    def _path(self, root: Path) -> Path:
        files = [self.file] if self.file else TABLES
        found = [root / file for file in files if (root / file).is_file()]
        if len(found) != 1:
            problem = "holds both" if found else "has no"
            raise UserError(f"{root} {problem} {' and '.join(files)}: name one as captions.file")
        return found[0]


class _TableReader:
    """Captions of a table, by file name."""

    def __init__(self, captions: Mapping[str, Captions]) -> None:
        self._captions = captions

    @property
    def listed(self) -> Collection[str]:
        return self._captions.keys()

    def __call__(self, name: str) -> Captions:
        return self._captions.get(name, {})

    def absence(self, name: str) -> str | None:
        return None


@register
class ClassNames:
    """The name of the folder that contains an image, as "a photo of a <class>" (Sec. 5.1).

    Args:
        template: the sentence, with {} in place of the class.
        names: JSON file {folder: class}; by default the folder's name with spaces for underscores.
    """

    def __init__(self, *, template: str = "a photo of a {}", names: str | None = None) -> None:
        expect(_is_template(template), "template", template, "must hold {} once, and no other {")
        self.template, self.names = template, names

    def open(self, root: Path, kinds: Sequence[str]) -> Reader:
        if "text" not in kinds:
            raise UserError(
                f"mix {', '.join(kinds)} must be text: class names have no other kind of caption"
            )
        names = _class_names(Path(self.names)) if self.names else None
        return _ClassReader(self.template, names, self.names)


class _ClassReader:
    """Captions made from folder names."""

    listed: Collection[str] = ()

    def __init__(self, template: str, names: dict[str, str] | None, file: str | None) -> None:
        self._template, self._names, self._file = template, names, file

    def __call__(self, name: str) -> Captions:
        folder = posixpath.basename(posixpath.dirname(name))
        if not folder:
            return {}
        if self._names is not None and folder not in self._names:
            raise BadImage(f"{self._file} has no class for the folder {folder!r}")
        label = self._names[folder] if self._names is not None else folder.replace("_", " ")
        if not _is_text(label):
            raise BadImage("the name of its folder is not UTF-8")
        return {"text": (self._template.format(label),)}

    def absence(self, name: str) -> str | None:
        return None


@register
class Constant:
    """The same caption for every image, as in DreamBooth: "a photo of sks dog".

    Args:
        caption: the caption.
    """

    def __init__(self, *, caption: str) -> None:
        expect(bool(caption.strip()), "captions.caption", caption, "must not be empty")
        self.caption = caption

    def open(self, root: Path, kinds: Sequence[str]) -> Reader:
        if "text" not in kinds:
            raise UserError(
                f"mix {', '.join(kinds)} must be text: a constant has no other kind of caption"
            )
        return _ConstantReader(self.caption)


class _ConstantReader:
    """One caption, whatever the file."""

    listed: Collection[str] = ()

    def __init__(self, caption: str) -> None:
        self._caption = caption

    def __call__(self, name: str) -> Captions:
        return {"text": (self._caption,)}

    def absence(self, name: str) -> str | None:
        return None


def sidecar_suffix(kind: str) -> str:
    """The sidecar suffix of a kind: `.txt` for "text", `.synthetic.txt` for "synthetic"."""
    return ".txt" if kind == "text" else f".{kind}.txt"


def kind_of(suffix: str) -> str | None:
    """The kind of caption of a file's suffix, or None: the inverse of `sidecar_suffix`."""
    if suffix == ".txt":
        return "text"
    kind = suffix.removeprefix(".").removesuffix(".txt")
    return kind if kind.isidentifier() and suffix == sidecar_suffix(kind) else None


def lines_of(data: bytes, file: str) -> tuple[str, ...]:
    """The captions of a text file: its non-blank lines.

    Raises:
        BadImage: it is not UTF-8.
    """
    try:
        return tuple(cleaned(data.decode("utf-8-sig").split("\n")))
    except UnicodeDecodeError as error:
        raise BadImage(f"its caption {file} is not UTF-8") from error


def object_of(data: bytes, file: str) -> dict[str, Any]:
    """A JSON object; an empty one where the JSON is something else.

    Raises:
        BadImage: it is not JSON.
    """
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"its {file} is not JSON: {first_line(error)}") from error
    return row if isinstance(row, dict) else {}


def columns_of(row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Captions of a JSON object, by kind: all keys whose value is a string or a list of strings."""
    lists = {
        kind: [text for text in value if text is not None] if isinstance(value, list) else [value]
        for kind, value in row.items()
    }
    found = {
        kind: tuple(cleaned(texts)) for kind, texts in lists.items() if all(map(_is_text, texts))
    }
    return {kind: texts for kind, texts in found.items() if texts}


def cleaned(texts: Iterable[str]) -> Iterator[str]:
    """Texts without line breaks, repeated spaces and byte order marks; blank ones are dropped."""
    return filter(None, (" ".join(text.replace("\ufeff", "").split()) for text in texts))


def check_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """A mix as plain floats, without the kinds of zero weight."""
    mapping("mix", mix)
    for kind, weight in mix.items():
        number(f"mix[{kind!r}]", weight, 0)
    plain = {str(kind): float(weight) for kind, weight in mix.items()}
    expect(any(plain.values()), "mix", plain, "must not all be zero")
    for kind in plain:
        expect(kind.isidentifier(), "mix", kind, "must be an identifier: it is part of file names")
    return {kind: weight for kind, weight in plain.items() if weight}


def has_caption(captions: Captions, kinds: Iterable[str]) -> bool:
    """Whether an image has a caption of any of these kinds."""
    return any(captions.get(kind) for kind in kinds)


def choose(
    captions: Mapping[str, Sequence[T]], mix: Mapping[str, float], generator: torch.Generator
) -> T:
    """Choose one caption: first a kind by its weight, then one of that kind uniformly.

    Captions may be texts or anything that represents them, such as positions in a cache. Exactly
    two numbers are drawn, so that later draws do not depend on the captions.
    """
    kinds = [kind for kind in mix if captions.get(kind)]
    weights = torch.tensor([mix[kind] for kind in kinds], dtype=torch.float64)
    which, among = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    reached = (weights.cumsum(0) / weights.sum() > which).nonzero()
    texts = captions[kinds[int(reached[0])]]
    return texts[int(among * len(texts))]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError as error:
        raise BadImage(f"its caption {path.name} cannot be read (permission denied)") from error
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        return False


def _is_text(value: object) -> bool:
    """Whether it is a string that can be encoded: JSON can contain lone surrogates."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _texts(value: Any, place: str) -> Iterator[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_is_text, values)):
        raise UserError(f"{place} {value!r} must be a caption or a list of captions")
    return cleaned(values)


def _is_template(template: str) -> bool:
    """Whether `template.format(word)` inserts the word once and needs nothing else."""
    try:
        fields = [field for _, *field in string.Formatter().parse(template) if field[0] is not None]
    except ValueError:  # an unmatched brace
        return False
    return fields == [["", "", None]]


def _class_names(path: Path) -> dict[str, str]:
    try:
        names = json.loads(_text_of(path))
    except OSError as error:
        raise UserError(f"names {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"names {str(path)!r} must be a JSON file: {first_line(error)}") from error
    if not isinstance(names, dict) or not all(map(_is_text, names.values())):
        raise UserError(f"names {str(path)!r} must be a JSON object {{folder: class}}")
    return names


def _text_of(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UserError: it is not UTF-8.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: must be UTF-8") from error


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, JSON lines or CSV with a header, each with its place for messages.

    Args:
        columns: that a CSV file must have; a row of JSON may lack some.

    Raises:
        UserError: it cannot be read; the message names the line.
    """
    return _csv_rows(path, columns) if path.suffix.lower() == ".csv" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for count, line in enumerate(io.StringIO(_text_of(path), newline=None), 1):
        if not line.strip():
            continue
        place = f"{path}, line {count}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: must be an object, {{...}}")
        yield place, row


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    records = _csv_records(path)
    header = [name.strip() for _, fields in itertools.islice(records, 1) for name in fields]
    for name in columns:
        if header.count(name) != 1:
            found = ", ".join(header) or "none"
            raise UserError(f"{path} must have one column {name!r}; its columns are {found}")
    for place, fields in records:
        if len(fields) != len(header):
            raise UserError(
                f"{place}: has {len(fields)} fields, not {len(header)} as the header: a caption "
                "with commas must be in quotes"
            )
        yield place, dict(zip(header, fields, strict=True))


def _csv_records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The fields of each non-empty row, and its first line: a row may span several lines."""
    csv.field_size_limit(MAX_BYTES)  # for this process; the default of 131,072 is too small
    lines = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True)
    while True:
        place = f"{path}, line {lines.line_num + 1}"
        try:
            fields = next(lines, None)
        except csv.Error as error:
            raise UserError(f"{place}: not CSV, a quote may be unclosed: {error}") from error
        if fields is None:
            return
        if fields:
            yield place, fields
