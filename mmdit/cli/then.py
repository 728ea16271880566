"""What is trained after a run, from its result: `then=<experiment>`."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra.core.global_hydra import GlobalHydra

from mmdit.checks import did_you_mean, nearest
from mmdit.cli.commands import quoted
from mmdit.cli.launch import sweep_label
from mmdit.cli.reading import TrainingRequest
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.programs import command

log = logger("mmdit.train")

# Sections of the command line that hold for all that it trains; others describe the first run.
PASSED_ON = ("seed", "runs", "data", "device", "precision", "logger", "imports", "compile")
# What a recipe remains the same with, whose `then` may thus be taken for granted.
SAME_RECIPE = (
    *("experiment", "seed", "runs", "device", "precision", "logger", "compile"),
    *("name", "run", "resume"),
)


def next_words(request: TrainingRequest, run: Path) -> list[str]:
    """The arguments that train what is asked for next; none if that is not done here.

    A second run that was stopped is resumed. In a sweep and under torchrun the command is logged
    instead, and also where `then` is that of an experiment whose recipe the command line changes:
    it may not suit the result.

    Args:
        run: the finished run.
    """
    then = request.config.then
    if then is None:
        return []
    kept = passed_on(request.words)
    folder = run.with_name(f"{run.name}-{then}")
    words = [f"experiment={then}", f"initial={quoted(run)}", f"run={quoted(folder)}"]
    words += ["resume=finish", *kept]
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # that torchrun started on this machine
    line = " ".join([command("train", processes=processes), *map(shlex.quote, words)])
    meant = is_meant(request.words)
    if sweep_label() or processes or not meant:
        fits = request.config.initial is None and request.data.name == "shapes"
        if request.processes.main and (meant or fits):
            log.info("then=%s is left to you here: %s", then, line)
        return []
    log.info("then: %s", line)
    return words


def is_meant(words: Sequence[str]) -> bool:
    """Whether `then` is typed, or belongs to a recipe that the command line leaves as it is."""
    sections = [section_of(word) for word in words if "=" in word or word.startswith("~")]
    typed = [section for section in sections if not section.startswith(("hydra", "--"))]
    return "then" in typed or set(typed) <= set(SAME_RECIPE)


def check_then(request: TrainingRequest) -> None:
    """Check, long before it is trained, that what comes next is an experiment.

    Raises:
        UserError: it is not, or it could not start from the result.
    """
    config = request.config
    if config.then is None or not GlobalHydra.instance().is_initialized():
        return
    if config.get("adapter") is not None and is_meant(request.words):
        raise UserError(
            f"then={config.then} needs a whole model to start from, which an adapter is not: leave "
            "one of then and adapter out"
        )
    known = GlobalHydra.instance().config_loader().get_group_options("experiment")
    if config.then not in known:
        hint = did_you_mean(nearest(str(config.then), known))
        raise UserError(f"then={config.then} is not an experiment.{hint}")


def passed_on(words: Sequence[str]) -> list[str]:
    """Those of the first run's arguments that the next one is given, too."""
    kept, rest = list[str](), iter(words)
    for word in rest:
        if word in ("--config-dir", "-cd"):
            kept.append(f"--config-dir={next(rest, '')}")
        elif word.startswith(("--config-dir=", "hydra.searchpath=")) or _holds_for_both(word):
            kept.append(word)
    return kept


def _holds_for_both(word: str) -> bool:
    """Whether an override is of a section of `PASSED_ON`: data=, data.samples=, data/part@..."""
    return section_of(word) in PASSED_ON and ("=" in word or word.startswith("~"))


def section_of(word: str) -> str:
    """The section that an override is of: `data.samples=50` -> `data`."""
    return re.split(r"[./@=]", word.lstrip("+~"), maxsplit=1)[0]


def replace_process(words: Sequence[str]) -> NoReturn:
    """Replace this process by the same program with other arguments; signals reach it as before."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *program(sys.orig_argv, sys.argv), *words])


def program(original: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The arguments with which Python runs this program: its options, then a script or -m module.

    Args:
        original: `sys.orig_argv`.
        arguments: `sys.argv`.

    Example:
        >>> program(["python", "-X", "dev", "train.py", "seed=1"], ["train.py", "seed=1"])
        ['-X', 'dev', 'train.py']
    """
    last = len(original) - len(arguments)
    if last > 0 and (original[last] == arguments[0] or original[last - 1] == "-m"):
        return list(original[1 : last + 1])
    return [arguments[0]]  # a process that was forked
