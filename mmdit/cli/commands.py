"""Command lines that messages name: how one goes on with a program."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path


def how_to_resume(run: Path | None, words: Sequence[str]) -> str:
    """The command line that goes on with a run started with `words`.

    Args:
        run: None in a sweep, whose every job finds its own.
    """
    kept = list(words)
    if run is not None:
        kept = [word for word in words if not word.startswith(("resume=", "run="))]
        plain = re.fullmatch(r"[\w./-]+", str(run))  # to Hydra
        kept.append(f"resume={run}" if plain else f'resume="{run}"')
    count = os.environ.get("LOCAL_WORLD_SIZE")  # of processes that torchrun started here
    program = ["torchrun", f"--nproc_per_node={count}"] if count else ["python"]
    return shlex.join([*program, "train.py", *kept])
