"""How a run stands, `status.json`, and what a killed process has left in its folder.

Its state is RUNNING, then FINISHED, PREEMPTED (a signal, after which all was saved) or FAILED. A
process that is killed says nothing more: whoever looks next and finds that nobody holds the folder
makes it FINISHED, where the last step had been saved, or KILLED.
"""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmdit.atomic import clear, write_atomically
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.runs.checkpoint import checkpoints_in
from mmdit.runs.files import remove

log = logger(__name__)
LOCK = ".lock"  # of a run folder, held by the process that trains
FOLDERS = ("", "checkpoints", "evaluations", "samples", "snapshots")  # that a run writes to


def write_status(run: Path, state: str, **facts: Any) -> None:
    """Say how a run stands; a full disk must not hide what happened."""
    content = json.dumps({"state": state, "process": os.getpid(), **facts}, indent=1)
    try:
        write_atomically(run / "status.json", content.encode())
    except OSError as error:
        log.warning("status.json could not be written: %s", error)


def read_status(run: Path) -> dict[str, Any]:
    """What `status.json` says; empty where there is none, or none that can be read."""
    try:
        return dict(json.loads((run / "status.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def state_of(run: Path) -> str:
    """The state of a run in lower case: 'running' where a process holds it; '' if unknown."""
    state = str(read_status(run).get("state", ""))
    if state == "RUNNING":
        with suppress(OSError), (run / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            state = "KILLED"
    return state.lower()


def mend(run: Path) -> None:
    """`tidy` a run that was killed, unless a process holds it or this one may not write there."""
    if read_status(run).get("state") == "RUNNING":
        with suppress(OSError), (run / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tidy(run)


def tidy(run: Path) -> None:
    """Set right what a killed process has left in a run folder, which this process holds."""
    remove_unfinished(run)
    for name in FOLDERS:
        clear(run / name)
    status = read_status(run)
    if status.get("state") != "RUNNING":
        return
    try:
        found = checkpoints_in(run, warn=False)
    except UserError:  # all are damaged, which is told when they are opened
        found = []
    step = found[-1].step if found else 0
    if found and found[-1].finished and step > status.get("step", 0):
        counted = {k: v for k, v in found[-1].metrics.items() if k == "skipped_steps"}
        write_status(run, "FINISHED", **counted)
    else:
        write_status(run, "KILLED", step=step)


def remove_unfinished(run: Path) -> None:
    """Remove the checkpoints that were being written or deleted."""
    for path in run.glob("checkpoints/*.tmp"):
        log.info("removing %s, which was not finished", path)
        remove(path)
