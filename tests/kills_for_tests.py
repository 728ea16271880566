"""Processes that are killed while they write, at chosen moments or at random ones."""

import os
import random
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from mmdit import atomic

CHANGES = ("rename", "replace", "link", "symlink", "mkdir", "unlink", "rmdir", "fsync", "chmod")


def at_each_change(
    act: Callable[[int], object], set_attribute: Callable[[Any, str, Any], None] = setattr
) -> None:
    """From now on `act(i)` is called before the i-th change of a file system's names."""
    numbers = count()

    def announced(original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            act(next(numbers))
            return original(*arguments, **options)

        return change

    for name in CHANGES:
        set_attribute(os, name, announced(getattr(os, name)))
    set_attribute(atomic, "_exchange", announced(atomic._exchange))


def forked(body: Callable[[], object]) -> int:
    """A process that does something; its id. It ends with 0, or with 1 after an exception."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return child


def changes_of(body: Callable[[], object]) -> int:
    """How many changes it makes; in a process of its own."""
    reader, writer = os.pipe()

    def counted() -> None:
        at_each_change(lambda _: os.write(writer, b"."))
        body()

    child = forked(counted)
    os.close(writer)
    with open(reader, "rb") as file:
        number = len(file.read())
    assert os.waitpid(child, 0)[1] == 0
    return number


def killed_at(change: int, body: Callable[[], object]) -> None:
    """Do something in a process that is killed before one of its changes."""

    def dying() -> None:
        at_each_change(lambda i: i == change and os.kill(os.getpid(), signal.SIGKILL))
        body()

    os.waitpid(forked(dying), 0)


def killed_at_random(draw: random.Random, longest: float, body: Callable[[], object]) -> bool:
    """Do something in a process that is killed at some moment; whether it was not done yet."""
    child = forked(body)
    time.sleep(draw.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, bytes | str]:
    """All that a folder holds, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }
