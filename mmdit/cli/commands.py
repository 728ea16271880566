"""Command lines that messages recommend."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from mmdit.programs import command


def how_to_resume(run: Path | None, words: Sequence[str]) -> str:
    """The command line that resumes a run.

    Args:
        run: the run folder; None in a sweep, in which every job finds its own.
        words: the arguments with which the run was started.
    """
    kept = list(words)
    if run is not None:
        kept = [word for word in words if not word.startswith(("resume=", "run="))]
        plain = re.fullmatch(r"[\w./-]+", str(run))  # needs no quotes in Hydra's grammar
        kept.append(f"resume={run}" if plain else f'resume="{run}"')
    count = os.environ.get("LOCAL_WORLD_SIZE")  # processes that torchrun started on this machine
    return " ".join([command("train", processes=count), *map(shlex.quote, kept)])
