"""Files of published tokenizers: read them, or say what is wrong with them."""

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
    """A file of a tokenizer, which travels with the model: its description holds its content.

    So nothing outside of a checkpoint is needed to open it, and nothing outside of it is read.

    Args:
        name: of the file.
        content: its bytes, compressed by zlib, in base 64.

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
            raise UserError(f"the content of {name} is cut off, or larger than any vocabulary")

    @classmethod
    def read(cls, path: str | Path, origin: str) -> Self:
        """A file on disk; `origin` says where such files come from.

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
            raise self.unfit("it is no UTF-8 text", origin) from error

    def json(self, origin: str) -> dict[str, Any]:
        """The JSON object in it.

        Raises:
            UserError: it holds something else.
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
        """The error for a file of no use: the fault, its likely cause, where to get the file."""
        head = self.data[:64].lstrip()
        if head.startswith(b"<"):
            cause = "a web page was saved in its place"
        elif head.startswith(b"version https://git-lfs"):
            cause = "it is a git-lfs pointer, and `git lfs pull` fetches its content"
        else:
            cause = "it was cut off on its way here, or is a file of another kind"
        return UserError(f"{self.place}: {fault}; probably {cause}. Such files are in {origin}")


def expect_file(value: object) -> None:
    """Refuse the path that older versions noted in place of a file's content.

    Raises:
        UserError: it is one, or something else.
    """
    if not isinstance(value, VocabularyFile):
        raise UserError(
            f"the tokenizer is noted as the file {value!r}, as older versions did; what a "
            "checkpoint names elsewhere is not read. Put the folders tokenizer/, tokenizer_2/ and "
            "tokenizer_3/ into the run's folder or beside the file, or name the folder that holds "
            "them as tokenizers=<folder> (of sample.py: text.tokenizers=<folder>)"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a tokenizer's file."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
