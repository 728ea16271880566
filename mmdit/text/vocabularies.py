"""Files of published tokenizers: read them, or say what is wrong with them."""

import json
from pathlib import Path
from typing import Any

from mmdit.errors import UserError


def read_file(path: str, origin: str) -> bytes:
    """Content of a tokenizer's file; `origin` says where such files come from.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); such files are in {origin}"
        ) from error
    if not data:
        raise unfit(path, "it is empty", origin)
    return data


def read_text(path: str, origin: str) -> str:
    """UTF-8 content of a tokenizer's file.

    Raises:
        UserError: it cannot be read, is empty, or is no text.
    """
    try:
        return read_file(path, origin).decode("utf-8")
    except UnicodeDecodeError as error:
        raise unfit(path, "it is no UTF-8 text", origin) from error


def read_json(path: str, origin: str) -> dict[str, Any]:
    """The JSON object that a tokenizer's file holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(read_text(path, origin))
    except (json.JSONDecodeError, RecursionError) as error:
        raise unfit(path, f"it is no whole JSON ({error})", origin) from error
    if not isinstance(content, dict):
        raise unfit(path, "it is no JSON object", origin)
    return content


def unfit(path: str, fault: str, origin: str) -> UserError:
    """The error for a file of no use: the fault, its likely cause, where to get the file."""
    with Path(path).open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"<"):
        cause = "a web page was saved in its place"
    elif head.startswith(b"version https://git-lfs"):
        cause = "it is a git-lfs pointer, and `git lfs pull` fetches its content"
    else:
        cause = "it was cut off on its way here, or is a file of another kind"
    return UserError(f"{path}: {fault}; probably {cause}. Such files are in {origin}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a tokenizer's file."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
