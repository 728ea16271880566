"""Files of published tokenizers, embedded in the model's description."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any, Self

from mmdit.bounds import LARGEST_VOCABULARY, parse_json, read_bounded
from mmdit.errors import UserError
from mmdit.registry import register


@register
class VocabularyFile:
    """A tokenizer's file, whose content is part of the model's description.

    A checkpoint is therefore self-contained: opening it neither needs nor reads any other file.

    Args:
        name: the file's name.
        content: its bytes, compressed by zlib, in base64.

    Raises:
        UserError: the content is damaged, or larger than any vocabulary.
    """

    def __init__(self, *, name: str, content: str) -> None:
        self.name = self.place = name
        try:
            unpacker = zlib.decompressobj()
            self.data = unpacker.decompress(base64.b64decode(content), LARGEST_VOCABULARY)
        except (ValueError, zlib.error) as error:
            raise UserError(f"the content of {name} is damaged ({error})") from None
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise UserError(f"the content of {name} is truncated, or larger than any vocabulary")

    @classmethod
    def read(cls, path: str | Path, origin: str) -> Self:
        """Read a file.

        Args:
            path: the file.
            origin: where such files are found, for error messages.

        Raises:
            UserError: it cannot be read, is not a regular file, or is larger than any vocabulary.
        """
        try:
            data = read_bounded(Path(path), LARGEST_VOCABULARY)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); such files are in {origin}"
            ) from error
        content = base64.b64encode(zlib.compress(data)).decode()
        file = cls(name=Path(path).name, content=content)
        file.place = str(path)
        return file

    def bytes(self, origin: str) -> bytes:
        """The content.

        Raises:
            UserError: it is empty.
        """
        if not self.data:
            raise self.unfit("it is empty", origin)
        return self.data

    def text(self, origin: str) -> str:
        """The content as UTF-8.

        Raises:
            UserError: it is empty, or is not text.
        """
        try:
            return self.bytes(origin).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.unfit("it is not UTF-8 text", origin) from error

    def json(self, origin: str) -> dict[str, Any]:
        """The content as a JSON object.

        Raises:
            UserError: it is something else.
        """
        self.text(origin)
        try:
            content = parse_json(self.data)
        except ValueError as error:
            raise self.unfit(f"it is not complete JSON ({error})", origin) from error
        if not isinstance(content, dict):
            raise self.unfit("it is not a JSON object", origin)
        return content

    def unfit(self, fault: str, origin: str) -> UserError:
        """The error for an unusable file: the fault, its likely cause, where to get the file."""
        head = self.data[:64].lstrip()
        if head.startswith(b"<"):
            cause = "a web page was saved in its place"
        elif head.startswith(b"version https://git-lfs"):
            cause = "it is a git-lfs pointer, and `git lfs pull` fetches its content"
        else:
            cause = "its download was incomplete, or it is a file of another kind"
        return UserError(f"{self.place}: {fault}; probably {cause}. Such files are in {origin}")


def expect_file(value: object) -> None:
    """Reject a path, which older versions recorded instead of the file's content.

    Raises:
        UserError: the value is not a `VocabularyFile`.
    """
    if not isinstance(value, VocabularyFile):
        raise UserError(
            f"the tokenizer is recorded as the path {value!r}, as older versions did; files "
            "outside of the checkpoint are not read. Put the folders tokenizer/, tokenizer_2/ and "
            "tokenizer_3/ into the run's folder or next to the file, or pass the folder that "
            "contains them as tokenizers=<folder> (on a command line: text.tokenizers=<folder>)"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a tokenizer's JSON file."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
