"""Run folders, one per training run, locked while a process writes to them."""

import fcntl
import json
import os
import re
import signal
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from mmdit.atomic import write_atomically
from mmdit.errors import UserError, first_line
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.recipes import differences
from mmdit.runs.checkpoint import Checkpoint, checkpoints_in, runs_in
from mmdit.runs.lengthening import before_its_end, how_to_lengthen
from mmdit.runs.signals import Interrupted
from mmdit.runs.status import LOCK, clean_up, state_of, write_status

log = logger(__name__)

# Config keys that may differ between a run and its continuation: where and how often, ...
FREE = (
    *("run", "runs", "resume", "then", "logger", "device", "compile", "parallel"),
    *("activation_checkpointing", "computed"),
    *(f"latents.{key}" for key in ("folder", "root", "shard_size", "threads", "verify")),
    *("variant", "metrics", "clip", "imports"),  # for measurements after training
    *("sampling", "text_device", "prior.batch_size", "student.batch_size"),
    # Data are identified by their content, not by their location.
    *(
        f"{data}.{key}"
        for data in ("data", "data.parts.*")
        for key in ("root", "report", "index", "threads", "max_bad_fraction")
    ),
    *(f"training.{key}" for key in ("steps", "log_every", "evaluate_every", "save_every")),
    *(f"training.{key}" for key in ("keep", "keep_every", "keep_best")),
    *(
        f"training.{key}"
        for key in ("asynchronous", "accumulation", "workers", "timeout", "nonfinite")
    ),
)
LONGEST_NAME = 240  # bytes of a path component: file systems allow 255, and a number is appended
# ... and the learning rate, which is lowered on purpose after a loss that was not finite. A variant
# of a sweep, however, must have been trained with its own.
LOWERED = ("optimizer.lr", "student.optimizer.lr")


class RunFolder:
    """A run folder, locked by this process on behalf of all processes of the run.

    Args:
        path: the folder; created if it does not exist.
        wait: wait until another process releases the folder, instead of raising.
        held: whether this process takes the lock; False in the other processes of the run.

    Raises:
        UserError: another process is using the folder and `wait` is off; or it cannot be written
            or locked.
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
        clean_up(path)

    def _wait(self, lock: IO[str]) -> None:
        """Wait until no other process holds the folder."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for process %s, which is using %s", self._owner(), self.path)
            fcntl.flock(lock, fcntl.LOCK_EX)

    def _owner(self) -> str:
        """ID of the process that holds the folder, as written in the lock file."""
        assert self._lock is not None
        self._lock.seek(0)
        return self._lock.read().strip() or "unknown"

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def marked(self, step: int) -> Iterator[dict[str, Any]]:
        """Keep `status.json` up to date while the block trains from `step` on.

        Whatever the block puts into the dictionary is stored, too. After a kill -9 the file says
        RUNNING until the run is next looked at: see `mmdit.runs.status`.
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
        """Store in `command.txt` the command line that resumes this run."""
        if self._lock is not None:
            write_atomically(self.path / "command.txt", f"{again}\n".encode())

    def command(self) -> str | None:
        """The command line that resumes this run, if it was stored."""
        path = self.path / "command.txt"
        return path.read_text(errors="replace").strip() if path.is_file() else None

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None."""
        found = checkpoints_in(self.path)
        return found[-1] if found else None


HELD: weakref.WeakSet[RunFolder] = weakref.WeakSet()  # those this process has locked


def _leave_to_parent() -> None:
    """Release the locks in a forked process: a data-loader worker may outlive a kill -9."""
    for folder in list(HELD):
        folder.close()


os.register_at_fork(after_in_child=_leave_to_parent)


def with_state(run: Path) -> str:
    """A run as messages list it: its folder and, if known, its state."""
    state = state_of(run)
    return f"{run} ({state})" if state else str(run)


def numbered_runs(root: Path, name: str) -> list[Path]:
    """The run folders `<name>-<number>` under `root`, sorted by number."""
    place = root / name
    pattern = re.compile(re.escape(place.name) + r"-([0-9]{3,})")
    there = list(place.parent.iterdir()) if place.parent.is_dir() else []
    found = [(int(m[1]), path) for path in there if (m := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def check_name(name: str | None) -> None:
    """Check that a run can have this name below the folder of all runs.

    Raises:
        UserError: it is empty or absolute, leads out of the folder, has a component that is too
            long, or contains characters that are not printable.
    """
    name = name or ""  # of name=null
    parts = name.split("/")
    if any(part in ("", ".", "..") or part != part.strip() for part in parts):
        problem = "must be a name, or names with single slashes between them, below runs="
    elif not name.isprintable():
        problem = "must not contain line breaks or other characters that are not printable"
    elif any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        problem = f"is too long: at most {LONGEST_NAME} bytes"
    else:
        return
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    raise UserError(f"name={shown!r} {problem}")


def next_run(root: Path, name: str) -> Path:
    """Create a new folder `<name>-<number>`, which no other process creates at the same time.

    Raises:
        UserError: the name is invalid, see `check_name`.
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
    """Call `open_run` in the main process, which locks the folder for all.

    Raises:
        UserError: as `open_run`, in all processes.
    """
    folder: RunFolder | None = None
    problem: UserError | None = None
    if processes.main:
        try:
            folder = open_run(*arguments, **options)
        except UserError as error:
            problem = error
    path, failure = processes.broadcast((folder and folder.path, problem))
    if failure is not None:
        raise problem or failure
    return folder or RunFolder(path, held=False)  # type: ignore[arg-type]


def open_run(
    root: Path, *, name: str, run: str | None, resume: str | None, config: Mapping[str, Any]
) -> RunFolder:
    """Open the folder of this run: a new one, or one to resume.

    Args:
        root: folder of all runs.
        name: name of the experiment; new runs are called `<name>-<number>`.
        run: folder to use instead.
        resume: which run to resume:
            None: none, start a new one;
            'auto': the newest run of this name with steps left; otherwise one with exactly this
            config that is finished or was stopped before its first checkpoint; otherwise none;
            'finish': `run`, whether it is new, stopped or finished, once no other process uses it;
            a run folder: that one.
        config: plain config; stored in the folder, and compared when resuming.

    Raises:
        UserError: the folder is in use, holds another run, or does not exist to resume.
    """
    if resume is None:
        folder = RunFolder(Path(run)) if run else RunFolder(next_run(root, name))
        if folder.latest() is not None:
            raise UserError(
                f"run folder {folder.path} already holds a run at step {folder.latest().step}: "  # type: ignore[union-attr]
                f"resume it with resume={folder.path}, or choose another folder"
            )
    elif resume == "finish":
        if run is None:
            raise UserError("resume=finish needs run=<folder>, the run to finish")
        folder = RunFolder(Path(run), wait=True)
    elif resume == "auto":
        candidates = [Path(run)] if run else numbered_runs(root, name)
        chosen = _run_to_resume(candidates, config)
        if chosen is None:
            log.info(
                "resume=auto: no run %s has steps left, starting a new one", run or f"{name}-*"
            )
            return open_run(root, name=name, run=run, resume=None, config=config)
        folder = RunFolder(chosen)
    else:
        path = Path(resume)
        if not (path / "config.json").is_file() and not (path / "checkpoints").is_dir():
            runs = [with_state(run) for run in runs_in(root)]
            listed = ", ".join(runs[:10]) + (f" and {len(runs) - 10} more" if runs[10:] else "")
            raise UserError(
                f"resume={resume}: there is no run in that folder (no config.json, no checkpoints);"
                f" the runs in {root} are {listed or 'none'}"
            )
        folder = RunFolder(path)
        # A run that was stopped before its first checkpoint has a config all the same.
        before = _config_of(path, []) if folder.latest() is None else {}
        changed = differences(before, config, (*FREE, *LOWERED)) if before else []
        if changed:
            _refuse(folder, changed, before, config)
    return _claim(folder, config, FREE if resume == "finish" else (*FREE, *LOWERED))


def _run_to_resume(candidates: Sequence[Path], config: Mapping[str, Any]) -> Path | None:
    """The run that resume=auto chooses; candidates are sorted, the newest last.

    Older candidates are read only if needed, so that a damaged one does not matter to a newer one.
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
    """The config of the newest checkpoint; if there is none, the run's config.json."""
    if checkpoints:
        return dict(checkpoints[-1].manifest["config"])
    try:
        return dict(json.loads((run / "config.json").read_text()))
    except (OSError, ValueError):
        return {}


def _claim(folder: RunFolder, config: Mapping[str, Any], may_differ: Sequence[str]) -> RunFolder:
    """Compare the config with that of the newest checkpoint, if any, and store it."""
    latest = folder.latest()
    if latest is not None:
        before = _config_of(folder.path, [latest])
        free = (*may_differ, *before_its_end(before, config, latest.step))
        was, here = _computed(before), _computed(config)
        if was == here:
            free = (*free, "precision")  # requested or chosen by auto: no difference
        if changed := differences(before, config, free):
            _refuse(folder, changed, before, config)
        for change in differences(before, config, (*FREE, "precision")):
            log.info("resuming with a different value: %s", change)
        if None not in (was, here) and was != here:
            log.warning(
                "%s was computed in %s so far and is computed in %s from now on, because "
                "precision=auto selects that on this machine; to keep it, give precision=%s",
                *(folder.path, was, here, was),
            )
    write_atomically(folder.path / "config.json", json.dumps(config, indent=1).encode())
    return folder


def _refuse(
    folder: RunFolder,
    changed: Sequence[object],
    before: Mapping[str, Any],
    config: Mapping[str, Any],
) -> NoReturn:
    """Let go of a run whose config differs from that of this command, and say where."""
    folder.close()
    more = f"; {len(changed) - 10} more" if changed[10:] else ""
    listed = "; ".join(map(str, changed[:10])) + more
    raise UserError(
        f"cannot resume {folder.path}, its config differs: {listed}. Give its own command: "
        f"{folder.command() or 'the one that started it, with resume='}; or start a "
        "new run without resume= (a sweep: under another name=)"
        + how_to_lengthen(before, config, folder.path, checkpoints_in(folder.path))
    )


def _computed(config: Mapping[str, Any]) -> str | None:
    """The precision a run computes in, bf16 or fp32; None if an older run does not state it."""
    precision = config.get("precision")
    computed = config.get("computed") or (precision if precision != "auto" else None)
    return None if computed is None else str(computed)
