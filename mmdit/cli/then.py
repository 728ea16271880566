"""What is trained after a run, from its result: `then=<experiment>`."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from mmdit.checks import did_you_mean, nearest
from mmdit.cli.initial import given_keys
from mmdit.cli.launch import sweep_label
from mmdit.cli.reading import TrainingRequest
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.programs import command

log = logger("mmdit.train")

# Sections of the command line that hold for all that it trains; others describe the first run.
PASSED_ON = ("seed", "runs", "data", "device", "precision", "logger", "imports", "compile")


def next_words(request: TrainingRequest, run: Path) -> list[str]:
    """The arguments that train what is asked for next; none if that is not done here.

    A run that was stopped is gone on with. In a sweep and under torchrun, and with other data than
    an experiment made its choice for, the command line is logged instead.

    Args:
        run: the finished run.
    """
    then = request.config.then
    if then is None:
        return []
    if request.data.name != "shapes" and "then" not in given_keys():
        return []  # the judge of the default knows shapes
    kept = list(passed_on(request.words))
    folder = run.with_name(f"{run.name}-{then}")
    words = [f"experiment={then}", f"initial={run}", f"run={folder}", "resume=finish", *kept]
    line = " ".join([command("train"), *map(shlex.quote, words)])
    if sweep_label() or request.processes.world_size > 1:
        if request.processes.main:
            log.info("then=%s is left to you here: %s", then, line)
        return []
    log.info("then: %s", line)
    return words


def check_then(config: DictConfig) -> None:
    """Check, long before it is trained, that what comes next is an experiment.

    Raises:
        UserError: it is not.
    """
    if config.then is None or not GlobalHydra.instance().is_initialized():
        return
    known = GlobalHydra.instance().config_loader().get_group_options("experiment")
    if config.then not in known:
        hint = did_you_mean(nearest(str(config.then), known))
        raise UserError(f"then={config.then} is not an experiment.{hint}")


def passed_on(words: Sequence[str]) -> Iterator[str]:
    """Those of the first run's arguments that the next one is given, too."""
    for word, following in pairwise([*words, ""]):
        if word in ("--config-dir", "-cd"):
            yield f"--config-dir={following}"
        elif word.startswith(("--config-dir=", "hydra.searchpath=")) or _holds_for_both(word):
            yield word


def _holds_for_both(word: str) -> bool:
    """Whether an override is of a section of `PASSED_ON`: data=, data.samples=, data/part@..."""
    return re.split(r"[./@=]", word.lstrip("+~"), maxsplit=1)[0] in PASSED_ON


def become(words: Sequence[str]) -> NoReturn:
    """Replace this process by the same program with other arguments; signals reach it as before."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *_flags(), sys.argv[0], *words])


def _flags() -> list[str]:
    """The interpreter's own options, as -u and -W."""
    given = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    return [word for word in given if word.startswith("-")]
