"""Names of the programs: `python train.py` in a checkout, `mmdit-train` where installed.

Messages that say what to type name a program as the one that is running was started.
"""

import re
import sys
from pathlib import Path


def installed() -> bool:
    """Whether one of the installed programs is running, as `mmdit-train`, and not a script."""
    return Path(sys.argv[0].partition(" ")[0]).name.startswith("mmdit-")


def command(name: str, *, processes: str | int | None = None) -> str:
    """How to start a program.

    Args:
        name: of its script, without the ending: `train`, `eval/rank`.
        processes: how many torchrun is to start; None starts one without it.

    Example:
        >>> command("train", processes=2)
        'torchrun --nproc_per_node=2 train.py'
    """
    words = f"mmdit-{name.replace('/', ' ')}" if installed() else f"{name}.py"
    if processes is None:
        return words if installed() else f"python {words}"
    no_python = "--no-python " if installed() else ""
    return f"torchrun --nproc_per_node={processes} {no_python}{words}"


def as_started(text: str) -> str:
    """A text that names scripts, `python eval/rank.py`, as it reads for who started a program."""
    text = re.sub(
        r"torchrun --nproc_per_node=(\S+) ([\w/]+)\.py\b",
        lambda found: command(found[2], processes=found[1]),
        text,
    )
    return re.sub(r"python ([\w/]+)\.py\b", lambda found: command(found[1]), text)
