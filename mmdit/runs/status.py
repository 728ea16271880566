"""The state of a run, `status.json`, and cleaning up what a killed process left in its folder.

The state is RUNNING, then FINISHED, PREEMPTED (stopped by a signal, after saving) or FAILED. A
process that is killed cannot change it: the next one that opens the run and finds the folder
unlocked sets it to FINISHED, if the last step was saved, or to KILLED.
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
    """Write the state of a run; a full disk gives only a warning, so as not to hide the cause."""
    content = json.dumps({"state": state, "process": os.getpid(), **facts}, indent=1)
    try:
        write_atomically(run / "status.json", content.encode())
    except OSError as error:
        log.warning("status.json could not be written: %s", error)


def read_status(run: Path) -> dict[str, Any]:
    """Content of `status.json`; empty if it is missing or unreadable."""
    try:
        return dict(json.loads((run / "status.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def state_of(run: Path) -> str:
    """State of a run in lower case; 'running' only while a process holds it, '' if unknown."""
    state = str(read_status(run).get("state", ""))
    if state == "RUNNING":
        with suppress(OSError), (run / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            state = "KILLED"
    return state.lower()


def clean_up_if_killed(run: Path) -> None:
    """Call `clean_up` for a run that was killed, if this process can lock its folder."""
    if read_status(run).get("state") == "RUNNING":
        with suppress(OSError), (run / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            clean_up(run)


def clean_up(run: Path) -> None:
    """Remove unfinished files and correct the state after a kill; this process holds the lock."""
    remove_unfinished(run)
    for name in FOLDERS:
        clear(run / name)
    status = read_status(run)
    if status.get("state") != "RUNNING":
        return
    try:
        found = checkpoints_in(run, warn=False)
    except UserError:  # all are damaged, which is reported when they are opened
        found = []
    step = found[-1].step if found else 0
    if found and found[-1].finished and step > status.get("step", 0):
        counted = {k: v for k, v in found[-1].metrics.items() if k == "skipped_steps"}
        write_status(run, "FINISHED", **counted)
    else:
        write_status(run, "KILLED", step=step)


def remove_unfinished(run: Path) -> None:
    """Remove checkpoints whose writing or deletion was interrupted."""
    for path in run.glob("checkpoints/*.tmp"):
        log.info("removing %s, which was not finished", path)
        remove(path)
