"""Pack Parquet files or a data set of the hub into tar shards: `python -m mmdit.data.hub`.

    python -m mmdit.data.hub rows/train-000.parquet shards --image jpg --text caption
    python -m mmdit.data.hub owner/name shards --split train --image image --text caption

Needs the extra `datasets`. Local files are read without a network. `--text` takes several columns:
the first has the kind "text", the others are kinds named as the columns. Images are copied, not
re-encoded.
"""

import argparse
import glob
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdit.checks import one_of
from mmdit.data.caption_sources import Captions, check_mix, cleaned
from mmdit.data.commands import add_options, command
from mmdit.data.images import BadImage, read_bytes
from mmdit.data.pack import pack_as_asked
from mmdit.data.patterns import find
from mmdit.errors import UserError, first_line


class Rows:
    """The rows of a map-style data set of the library `datasets`, as candidates for packing.

    Args:
        data: the data set; its image column is undecoded: {"bytes": ..., "path": ...} or bytes.
        image: name of the column of images.
        texts: kind of caption -> name of its column of strings or lists of strings.
    """

    def __init__(self, *, data: Any, image: str, texts: dict[str, str]) -> None:
        self._data, self._image, self._texts = data, image, texts
        self.names = [f"row {number:09d}" for number in range(len(data))]
        self.bad: dict[str, str] = {}

    def read(self, name: str) -> tuple[bytes, Captions]:
        """The image of a row and its captions.

        Raises:
            BadImage: it has no image, or no caption.
        """
        row = self._data[int(name.removeprefix("row "))]
        image = row[self._image]
        if isinstance(image, dict):
            path = image.get("path")
            image = image.get("bytes") or (path and read_bytes(Path(path)))
        if not isinstance(image, bytes):
            raise BadImage(f"has no image in column {self._image!r}")
        captions = {}
        for kind, column in self._texts.items():
            value = row[column]
            texts = value if isinstance(value, list) else [value]
            captions[kind] = tuple(cleaned(text for text in texts if isinstance(text, str)))
        if not any(captions.values()):
            raise BadImage(f"has no caption of the kind {' or '.join(captions)}")
        return image, captions

    def identity(self) -> dict[str, Any]:
        """The library's fingerprint of the files and their processing, and the columns."""
        return {"rows": self._data._fingerprint, "image": self._image, "text": self._texts}


def load_rows(
    source: str, *, config: str | None, split: str, image: str, texts: Sequence[str]
) -> Rows:
    """Open Parquet files or a data set of the hub.

    Args:
        source: a Parquet file, a pattern such as "rows/{00..09}.parquet", a folder of *.parquet,
            or the name of a data set of the hub.
        config: configuration of the data set, if it has several.
        split: split of a data set of the hub.
        image: column of images.
        texts: columns of captions; the first has the kind "text".

    Raises:
        UserError: the library is not installed, the files, the data set or a column do not exist,
            or two columns have the same kind of caption.
    """
    kinds = {"text": texts[0], **{column: column for column in texts[1:]}}
    if len(kinds) < len(texts):
        raise UserError(
            f"text {', '.join(texts)} must be different kinds of captions: the first column has "
            "the kind 'text', so no other column may be named 'text', nor may one be repeated"
        )
    check_mix(dict.fromkeys(kinds, 1.0))
    try:
        import datasets
    except ImportError as error:
        raise UserError('this needs the extra: pip install "sd3-mmdit[datasets]"') from error
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # errors are reported once, here
    files = _parquet_files(source)
    try:
        if files:
            data = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            data = datasets.load_dataset(source, config, split=split)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the library and its sources can raise anything
        reason = first_line(error)
        if error.__cause__ is not None:  # several lines, with the reason last
            reason = f"{reason}: {' '.join(str(error.__cause__).split())}"
        raise UserError(f"{source} cannot be opened: {reason}") from error
    for column in (image, *texts):
        one_of("column", column, data.column_names)
    if isinstance(data.features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    return Rows(data=data, image=image, texts=kinds)


def _parquet_files(source: str) -> list[str]:
    """The files that `source` names; empty if it is the name of a data set."""
    path = Path(source)
    files: list[Path] = []
    if path.is_dir():
        files = find(path, "*.parquet")
    elif path.suffix == ".parquet":
        files = find(path.parent, path.name)
    return [glob.escape(str(file)) for file in files]  # the library treats names as patterns


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command described in the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mmdit.data.hub", description="Pack Parquet files, or a data set of the hub."
    )
    parser.add_argument("source", help="file or folder of Parquet, or owner/name on the hub")
    parser.add_argument("out", type=Path, help="folder of shards; run again to continue")
    parser.add_argument("--config", help="configuration of a data set of the hub")
    parser.add_argument("--split", default="train", help="split of a data set of the hub")
    parser.add_argument("--image", default="image", help="column of images")
    parser.add_argument("--text", nargs="+", default=["text"], help="columns of captions")
    parser.add_argument("--per-shard", type=int, default=1000, help="number of rows per shard")
    add_options(parser)
    given = parser.parse_args(arguments)

    def body() -> None:
        rows = load_rows(
            given.source,
            config=given.config,
            split=given.split,
            image=given.image,
            texts=given.text,
        )
        pack_as_asked(rows, ("text", *given.text[1:]), given)

    return command(body)


if __name__ == "__main__":
    sys.exit(main())
