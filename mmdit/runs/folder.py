"""Run folders being written: one training run each, locked while in use."""

import fcntl
import json
import os
import re
import signal
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmdit.atomic import write_atomically
from mmdit.errors import UserError, first_line
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.recipes import differences
from mmdit.runs.checkpoint import Checkpoint, checkpoints_in, runs_in
from mmdit.runs.lengthening import before_its_end, how_to_lengthen
from mmdit.runs.signals import Interrupted
from mmdit.runs.status import LOCK, state_of, tidy, write_status

log = logger(__name__)

# What may differ between a run and its continuation: where and how often, ...
FREE = (
    *("run", "runs", "resume", "logger", "device", "compile", "parallel"),
    *("activation_checkpointing", "computed"),
    *(f"latents.{key}" for key in ("folder", "root", "shard_size", "threads", "verify")),
    *("variant", "metrics", "clip", "imports"),  # for what is measured afterwards
    *("sampling", "text_device"),
    # Whatever they are called, they are known by what was found there.
    *(f"data.{key}" for key in ("root", "report", "index", "threads", "max_bad_fraction")),
    *(f"training.{key}" for key in ("steps", "log_every", "evaluate_every", "save_every")),
    *(f"training.{key}" for key in ("keep", "keep_every", "keep_best")),
    *(
        f"training.{key}"
        for key in ("asynchronous", "accumulation", "workers", "timeout", "nonfinite")
    ),
)
LONGEST_NAME = 240  # bytes of a part: file systems take 255, and a number is appended
# ... and the learning rate, which one lowers on purpose after a loss that was not finite. A variant
# of a sweep must have been trained with its own.
LOWERED = ("optimizer.lr",)


class RunFolder:
    """A run folder held by this process, alone or for those that train with it.

    Args:
        path: made if it is not there.
        wait: for another process to let go of it.
        held: False in the processes that train with the one that holds it.

    Raises:
        UserError: another process is using it, and `wait` is off; or it cannot be written or
            locked.
    """

    def __init__(self, path: Path, *, wait: bool = False, held: bool = True) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        if not held:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("a+")
        except OSError as error:
            raise UserError(
                f"run folder {path} cannot be written ({error.strerror}): choose another with "
                "runs=<folder of all runs> or run=<folder>"
            ) from error
        try:
            if wait:
                self._wait(self._lock)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run folder {path} is in use by process {self._owner()}: wait for it, stop it, "
                "or choose another folder with run=<folder>"
            ) from error
        except OSError as error:  # network file systems may have no locks
            raise UserError(
                f"run folder {path} cannot be locked against a second run ({error.strerror}): "
                "choose one on a file system with locks (flock), with runs=<folder of all runs> or "
                "run=<folder>"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        HELD.add(self)
        tidy(path)

    def _wait(self, lock: IO[str]) -> None:
        """Return when no other process holds the folder."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for process %s, which is using %s", self._owner(), self.path)
            fcntl.flock(lock, fcntl.LOCK_EX)

    def _owner(self) -> str:
        """The number of the process that holds the folder, as it noted it."""
        assert self._lock is not None
        self._lock.seek(0)
        return self._lock.read().strip() or "unknown"

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def marked(self, step: int) -> Iterator[dict[str, Any]]:
        """Keep `status.json` while training runs from `step` on.

        What is put into the dictionary is kept, too. After a kill -9 it says RUNNING until somebody
        looks: see `mmdit.runs.status`.
        """
        facts: dict[str, Any] = {}
        self._mark("RUNNING", step=step)
        try:
            yield facts
        except Interrupted as stop:
            number = signal.Signals(stop.number)
            self._mark("PREEMPTED", step=stop.checkpoint.step, signal=number.name, **facts)
            raise
        except BaseException as error:
            self._mark("FAILED", error=first_line(error), **facts)
            raise
        self._mark("FINISHED", **facts)

    def _mark(self, state: str, **facts: Any) -> None:
        if self._lock is not None:
            write_status(self.path, state, **facts)

    def keep_command(self, again: str) -> None:
        """Keep in `command.txt` the command line that goes on with this run."""
        if self._lock is not None:
            write_atomically(self.path / "command.txt", f"{again}\n".encode())

    def command(self) -> str | None:
        """The command line that goes on with this run, if it was kept."""
        path = self.path / "command.txt"
        return path.read_text(errors="replace").strip() if path.is_file() else None

    def latest(self) -> Checkpoint | None:
        """The complete checkpoint of the greatest step."""
        found = checkpoints_in(self.path)
        return found[-1] if found else None


HELD: weakref.WeakSet[RunFolder] = weakref.WeakSet()  # by this process


def _leave_to_parent() -> None:
    """In a forked process: a loader worker that outlives a kill -9 must not hold the folder."""
    for folder in list(HELD):
        folder.close()


os.register_at_fork(after_in_child=_leave_to_parent)


def told_of(run: Path) -> str:
    """A run in a list: its folder, and how it stands where that is known."""
    state = state_of(run)
    return f"{run} ({state})" if state else str(run)


def numbered_runs(root: Path, name: str) -> list[Path]:
    """The run folders `<name>-<number>` under `root`, in the order of their numbers."""
    place = root / name
    pattern = re.compile(re.escape(place.name) + r"-([0-9]{3,})")
    there = list(place.parent.iterdir()) if place.parent.is_dir() else []
    found = [(int(m[1]), path) for path in there if (m := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def check_name(name: str | None) -> None:
    """Refuse a name under which no run can lie below the folder of all runs.

    Raises:
        UserError: it is empty or absolute, leads out of the folder, has a part that no file system
            takes, or holds characters that cannot be seen.
    """
    name = name or ""  # name=null is that
    parts = name.split("/")
    if any(part in ("", ".", "..") or part != part.strip() for part in parts):
        problem = "must be a name, or names with single slashes between them, below runs="
    elif not name.isprintable():
        problem = "must not hold line breaks and other characters that cannot be seen"
    elif any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        problem = f"is too long: at most {LONGEST_NAME} bytes"
    else:
        return
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    raise UserError(f"name={shown!r} {problem}")


def next_run(root: Path, name: str) -> Path:
    """A new folder `<name>-<number>`, made by this call alone.

    Raises:
        UserError: the name is none, see `check_name`.
    """
    check_name(name)
    runs = numbered_runs(root, name)
    number = int(runs[-1].name.rpartition("-")[2]) + 1 if runs else 1
    while True:
        path = root / f"{name}-{number:03d}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def open_together(processes: Processes, *arguments: Any, **options: Any) -> RunFolder:
    """`open_run` by the main process, which holds the folder for the others.

    Raises:
        UserError: what `open_run` raises, in all processes.
    """
    folder: RunFolder | None = None
    problem: UserError | None = None
    if processes.main:
        try:
            folder = open_run(*arguments, **options)
        except UserError as error:
            problem = error
    path, told = processes.broadcast((folder and folder.path, problem))
    if told is not None:
        raise problem or told
    return folder or RunFolder(path, held=False)  # type: ignore[arg-type]


def open_run(
    root: Path, *, name: str, run: str | None, resume: str | None, config: Mapping[str, Any]
) -> RunFolder:
    """The folder of this run: a new one, or the one to go on with.

    Args:
        root: folder of all runs.
        name: of the experiment; new runs are called `<name>-<number>`.
        run: folder to use instead.
        resume: None, 'auto' (the newest run of this name that has steps left; else one that was
            stopped before its first checkpoint, or is finished, with this very config; else a new
            one), 'finish' (`run`, whether it is new, was stopped or is finished; while another
            process works on it, that is waited for), or a run folder.
        config: plain config; kept in the folder, and compared when resuming.

    Raises:
        UserError: the folder is in use, holds another run, or is not there to resume.
    """
    if resume is None:
        folder = RunFolder(Path(run)) if run else RunFolder(next_run(root, name))
        if folder.latest() is not None:
            raise UserError(
                f"run folder {folder.path} already holds a run at step {folder.latest().step}: "  # type: ignore[union-attr]
                f"go on with it with resume={folder.path}, or choose another folder"
            )
    elif resume == "finish":
        if run is None:
            raise UserError("resume=finish needs run=<folder>, which says what is to be finished")
        folder = RunFolder(Path(run), wait=True)
    elif resume == "auto":
        candidates = [Path(run)] if run else numbered_runs(root, name)
        chosen = _to_go_on_with(candidates, config)
        if chosen is None:
            log.info(
                "resume=auto: no run %s has steps left, starting a new one", run or f"{name}-*"
            )
            return open_run(root, name=name, run=run, resume=None, config=config)
        folder = RunFolder(chosen)
    else:
        path = Path(resume)
        if not (path / "config.json").is_file() and not (path / "checkpoints").is_dir():
            runs = [told_of(run) for run in runs_in(root)]
            listed = ", ".join(runs[:10]) + (f" and {len(runs) - 10} more" if runs[10:] else "")
            raise UserError(
                f"resume={resume}: there is no run in that folder (no config.json, no checkpoints);"
                f" the runs in {root} are {listed or 'none'}"
            )
        folder = RunFolder(path)
    return _claim(folder, config, FREE if resume == "finish" else (*FREE, *LOWERED))


def _to_go_on_with(candidates: Sequence[Path], config: Mapping[str, Any]) -> Path | None:
    """What resume=auto chooses among runs, the newest last; one that is damaged is no reason to
    leave a newer one.
    """
    same = None
    for path in reversed(candidates):
        found = checkpoints_in(path)
        if found and found[-1].step < config["training"]["steps"]:
            return path
        if same is None and (not found or found[-1].finished):
            same = path if not differences(_config_of(path, found), config, FREE) else None
    return same


def _config_of(run: Path, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Of the newest checkpoint; where there is none, what a run that was begun has left."""
    if checkpoints:
        return dict(checkpoints[-1].manifest["config"])
    try:
        return dict(json.loads((run / "config.json").read_text()))
    except (OSError, ValueError):
        return {}


def _claim(folder: RunFolder, config: Mapping[str, Any], may_differ: Sequence[str]) -> RunFolder:
    """Keep the config in the folder, or compare it with that of the newest checkpoint."""
    latest = folder.latest()
    if latest is not None:
        before = _config_of(folder.path, [latest])
        free = (*may_differ, *before_its_end(before, config, latest.step))
        was, here = _computed(before), _computed(config)
        if was == here:
            free = (*free, "precision")  # asked for, or chosen by auto: the same
        changed = differences(before, config, free)
        if changed:
            folder.close()
            more = f"; {len(changed) - 10} more" if changed[10:] else ""
            told = "; ".join(map(str, changed[:10])) + more
            raise UserError(
                f"cannot go on with {folder.path}, its config differs: {told}. Give its own "
                f"command: {folder.command() or 'that which began it, with resume='}; or start a "
                "new run without resume= (a sweep: under another name=)"
                + how_to_lengthen(before, config, folder.path, checkpoints_in(folder.path))
            )
        for change in differences(before, config, (*FREE, "precision")):
            log.info("going on with another value: %s", change)
        if None not in (was, here) and was != here:
            log.warning(
                "%s was computed in %s up to here and is in %s from now on, because precision=auto "
                "means that on this machine; to keep it, give precision=%s",
                *(folder.path, was, here, was),
            )
    write_atomically(folder.path / "config.json", json.dumps(config, indent=1).encode())
    return folder


def _computed(config: Mapping[str, Any]) -> str | None:
    """bf16 or fp32, in which a run computes; None where an older one does not tell."""
    precision = config.get("precision")
    told = config.get("computed") or (precision if precision != "auto" else None)
    return None if told is None else str(told)
