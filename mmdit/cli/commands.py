"""Command lines that messages recommend."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from mmdit.programs import command


def quoted(value: str | Path) -> str:
    """A value as Hydra's grammar takes it for this very text, with quotes where it needs them."""
    text = str(value)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII):
        return text
    # A backslash counts only before a quote, and then itself has to be escaped.
    escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), text)
    return f'"{escaped}"'


def how_to_resume(run: Path | None, words: Sequence[str]) -> str:
    """The command line that resumes a run.

    Args:
        run: the run folder; None in a sweep, in which every job finds its own.
        words: the arguments with which the run was started.
    """
    kept = list(words)
    if run is not None:
        kept = [word for word in words if not word.startswith(("resume=", "run="))]
        kept.append(f"resume={quoted(run)}")
    count = os.environ.get("LOCAL_WORLD_SIZE")  # processes that torchrun started on this machine
    return " ".join([command("train", processes=count), *map(shlex.quote, kept)])
