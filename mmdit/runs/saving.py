"""Saving checkpoints atomically, in the background, from any number of processes.

A save copies the tensors to the CPU and returns. A thread then writes them to a temporary folder
(`step_00001000.tmp`), flushes them, adds the manifest, and renames the folder. If the process is
killed or the disk is full at any moment, the previous checkpoint is still intact.
"""

import errno
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmdit.atomic import file_hash, flush, write_atomically
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.processes import A_DAY, Processes
from mmdit.runs import tensors as tensor_files
from mmdit.runs.checkpoint import (
    FROZEN,
    Checkpoint,
    checkpoints_in,
    open_checkpoint,
    sealed,
    step_folders,
)
from mmdit.runs.files import await_file, gigabytes, how_to_go_on, make_empty, remove, sizes, unused
from mmdit.runs.provenance import code_version
from mmdit.runs.retention import Retention
from mmdit.runs.status import remove_unfinished

T = TypeVar("T")
Groups = Mapping[str, Mapping[str, Tensor]]
log = logger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT)


class Saver:
    """Writes the checkpoints of one run, and finds and loads the newest.

    Every process of the run constructs one, and all call its methods (except `facts`) at the same
    points. An error in one process is raised in all.

    Args:
        run: run folder, locked by this run, on a file system that all machines share.
        processes: the processes of the run.
        keep: which checkpoints to keep.
        config: plain config of the run, for the manifests.
        asynchronous: write while training goes on; False waits for each checkpoint.
    """

    def __init__(
        self,
        run: Path,
        processes: Processes,
        *,
        keep: Retention,
        config: Mapping[str, Any],
        asynchronous: bool = True,
    ) -> None:
        self.run, self.keep, self.config, self.asynchronous = run, keep, config, asynchronous
        alone = processes.group is None
        # The thread communicates over a group of its own, apart from training's communication.
        group = None if alone else dist.new_group(backend="gloo", timeout=A_DAY)
        self.processes = Processes(processes.rank, processes.world_size, group)
        self.code = code_version() if processes.main else {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Checkpoint] | None = None
        self._newest: Checkpoint | None = None
        self._frozen: dict[str, Any] | None = None  # its entry in manifests, once written
        self._in_main(self._remove_unfinished)

    def save(
        self,
        *,
        step: int,
        finished: bool,
        tensors: Groups,
        descriptions: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        """Write a checkpoint; returns once the tensors have been copied and may change again.

        Waits for the previous save to end.

        Args:
            step: number of steps completed.
            finished: whether the run has reached its last step.
            tensors: group ('raw', 'ema', 'frozen', 'optimizer') -> key -> tensor, on any device;
                the same keys in all processes. Each process writes its own part of a DTensor.
                Frozen weights are written once per run.
            descriptions: group -> description of its module, for groups that hold a module.
            metrics: metrics of the last evaluation.

        Raises:
            UserError: the previous save failed, because the disk is full or not writable.
        """
        self._finish_pending()
        staged: dict[str, dict[str, Tensor]] = {}
        changing = {name: group for name, group in tensors.items() if name != FROZEN}
        self._in_all(lambda: staged.update(copies(tensors if self._frozen is None else changing)))
        manifest = {
            "step": step,
            "finished": finished,
            "finished_at": datetime.now(UTC).isoformat() if finished else None,
            "figures": dict(metrics),
            "world_size": self.processes.world_size,
            "code": self.code,
            "descriptions": dict(descriptions),
            "config": self.config,
        }
        self._pending = self._thread.submit(self._write, staged, manifest)
        if not self.asynchronous:
            self._finish_pending()

    def wait(self) -> Checkpoint:
        """Wait until the newest checkpoint has been written, and return it.

        Raises:
            UserError: the disk is full, or not writable.
        """
        self._finish_pending()
        assert self._newest is not None, "nothing has been saved or found yet"
        return self._newest

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; None in a new run.

        All its bytes are verified. Newer ones that are damaged are renamed to `<name>.damaged`,
        with a warning.

        Raises:
            UserError: there are checkpoints, but all are damaged.
        """
        self._finish_pending()
        self._newest = self._in_main(self._find)
        self._frozen = self._newest.manifest.get(FROZEN) if self._newest else None
        return self._newest

    def facts(self, checkpoint: Checkpoint, group: str) -> dict[str, tensor_files.Fact]:
        """Shape and dtype of each tensor of a group, to allocate memory before `load`."""
        folder = checkpoint.group(group)
        return tensor_files.facts(folder) if folder.is_dir() else {}

    def load(self, checkpoint: Checkpoint, tensors: Groups) -> None:
        """Fill tensors in place from a checkpoint, written by any number of processes.

        Args:
            checkpoint: from `latest`.
            tensors: group -> key -> tensor, on any device; a DTensor receives this process's part.

        Raises:
            UserError: keys, shapes or dtypes differ from those saved.
        """
        self._finish_pending()

        def fill() -> None:
            for name, group in tensors.items():
                tensor_files.read_into(checkpoint.group(name), group)

        self._in_all(fill)

    def close(self) -> None:
        """Wait for the current save, and raise its error if it failed."""
        try:
            self._finish_pending()
        finally:
            self._thread.shutdown()
            if self.processes.group is not None and dist.is_initialized():
                dist.destroy_process_group(self.processes.group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            log.error("%s", failure)  # another error is being raised already

    # What follows runs in all processes at once, between two points where the thread is idle.

    def _finish_pending(self) -> None:
        """Wait for the thread, and raise its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._newest = pending.result()

    def _in_all(self, work: Callable[[], T]) -> list[T]:
        """Call `work` in every process and return all results; an error in one is raised in all."""
        result: T | None = None
        problem: Exception | None = None
        try:
            result = work()
        except Exception as error:
            problem = error
        sent = problem
        if problem is not None and not isinstance(problem, OSError | UserError):
            sent = RuntimeError(f"{type(problem).__name__}: {problem}")  # others may not pickle
        outcomes = self.processes.gather((result, sent))
        failures = [error for _, error in outcomes if error is not None]
        if failures:
            raise problem or failures[0]
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def _in_main(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process and return its result in all."""
        results = self._in_all(lambda: work() if self.processes.main else None)
        return results[0]  # type: ignore[return-value]

    def _remove_unfinished(self) -> None:
        """Remove what killed processes left unfinished."""
        remove_unfinished(self.run)

    def _find(self) -> Checkpoint | None:
        """The newest intact checkpoint; damaged newer ones are renamed."""
        faults: dict[Path, str] = {}
        for folder in reversed(step_folders(self.run)):
            try:
                checkpoint = open_checkpoint(folder)
                fault = checkpoint.fault()
            except UserError as error:
                fault = str(error)
            if fault is None:
                for damaged, reason in faults.items():
                    renamed = unused(damaged.with_name(f"{damaged.name}.damaged"))
                    damaged.rename(renamed)
                    log.warning(
                        "checkpoint %s is damaged: %s. It is renamed to %s; going on from step %d",
                        *(damaged, reason, renamed.name, checkpoint.step),
                    )
                return checkpoint
            faults[folder] = fault
        if faults:
            listed = "; ".join(f"{folder}: {fault}" for folder, fault in faults.items())
            raise UserError(
                f"all checkpoints of {self.run} are damaged ({listed}): restore a copy of one, or "
                "move them elsewhere to start again"
            )
        return None

    def _write(self, staged: Groups, manifest: Mapping[str, Any]) -> Checkpoint:
        """Write a complete checkpoint or nothing; runs in the thread."""
        folder = self.run / "checkpoints" / f"step_{manifest['step']:08d}"
        building, sharing = folder.with_name(f"{folder.name}.tmp"), folder.with_name("frozen.tmp")
        try:
            if FROZEN in staged:
                written = self._write_groups(sharing, {FROZEN: staged[FROZEN]})
                self._frozen = self._in_main(lambda: self._publish_frozen(sharing, written))
            groups = {name: group for name, group in staged.items() if name != FROZEN}
            written = self._write_groups(building, groups)
            return self._in_main(lambda: self._commit(building, folder, written, manifest))
        except Exception as error:
            if self.processes.main:
                shutil.rmtree(building, ignore_errors=True)
                shutil.rmtree(sharing, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._write_error(error, folder, staged) from error
            raise

    def _write_groups(self, building: Path, groups: Groups) -> dict[str, int]:
        """Write groups of tensors into a new folder, from all processes; returns the file sizes."""
        names = sorted(groups)
        self._in_main(lambda: make_empty(building, names))
        for name in names:
            self._in_all(partial(self._write_group, building / name, groups[name]))
        mine = f"*/shard-{self.processes.rank + 1:05d}-*"
        written = self._in_all(lambda: sizes(building.glob(mine), building))
        return {name: size for part in written for name, size in part.items()}

    def _write_group(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        tensor_files.write(folder, tensors, self.processes.group)

    def _publish_frozen(self, building: Path, written: Mapping[str, int]) -> dict[str, Any]:
        """Move frozen weights to where all checkpoints find them; returns their manifest entry."""
        files = _facts(building, written)
        digest = tensor_files.hash_of([building / FROZEN])
        flush(building / FROZEN)
        place = unused(building.with_name(f"{FROZEN}_{digest[:16]}"))
        (building / FROZEN).rename(place)
        building.rmdir()
        flush(place.parent)
        names = {name.rpartition("/")[2]: fact for name, fact in files.items()}
        return {"folder": place.name, "sha256": digest, "files": names}

    def _commit(
        self, building: Path, folder: Path, written: Mapping[str, int], manifest: Mapping[str, Any]
    ) -> Checkpoint:
        """Add the manifest, and rename the folder to its final name."""
        frozen = [folder.with_name(self._frozen["folder"])] if self._frozen else []
        facts = {
            **manifest,
            "weights_sha256": {
                group: tensor_files.hash_of([*frozen, building / group])
                for group in manifest["descriptions"]
            },
            **({FROZEN: self._frozen} if self._frozen else {}),
            "files": _facts(building, written),
        }
        for group in building.iterdir():
            flush(group)
        write_atomically(building / "manifest.json", sealed(facts))
        flush(building)
        former = None
        if folder.exists():  # the run was resumed from an earlier one
            former = folder.rename(unused(folder.with_name(f"{folder.name}.old.tmp")))
        building.rename(folder)
        flush(folder.parent)
        flush(self.run)
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)
        self._delete_old(manifest["step"])
        return open_checkpoint(folder)

    def _delete_old(self, step: int) -> None:
        """Delete checkpoints that are not to be kept; failing to is not an error of the save."""
        everything = checkpoints_in(self.run, warn=False)
        found = [checkpoint for checkpoint in everything if checkpoint.step <= step]
        kept = self.keep.kept(found)
        try:
            for checkpoint in found:
                if checkpoint.step not in kept:
                    unfinished = checkpoint.folder.with_name(checkpoint.folder.name + ".tmp")
                    checkpoint.folder.rename(unfinished)
                    remove(unfinished)
        except OSError as error:
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _write_error(self, error: OSError, folder: Path, staged: Groups) -> UserError:
        found = step_folders(self.run)
        before = f"the previous one is {found[-1].name}" if found else "there is no previous one"
        if error.errno not in FULL:
            return UserError(
                f"checkpoint {folder} could not be written ({error}); {before}. Once the "
                f"folder is writable, {how_to_go_on(self.run)}"
            )
        needed = sum(
            t.numel() * t.element_size() for group in staged.values() for t in group.values()
        )
        free = shutil.disk_usage(self.run).free
        return UserError(
            f"checkpoint {folder} could not be written, the disk is full or its quota exceeded: it "
            f"needs {gigabytes(needed)}, and {gigabytes(free)} are free there; {before}. Free some "
            f"space (old runs; this one keeps keep={self.keep.last} checkpoints) and "
            f"{how_to_go_on(self.run)}; or move {self.run} to another disk first, and leave a link "
            "to it"
        )


def copies(tensors: Groups) -> dict[str, dict[str, Tensor]]:
    """Contiguous copies on the CPU; for a DTensor, a copy of this process's part."""
    return {
        name: {
            key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, tensor in group.items()
        }
        for name, group in tensors.items()
    }


def _facts(folder: Path, written: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, after waiting for those written by other machines."""
    for name, size in written.items():
        await_file(folder / name, size)
    names = sorted(written)
    with ThreadPoolExecutor(4) as threads:
        hashes = list(threads.map(lambda name: file_hash(folder / name), names))
    return {n: {"bytes": written[n], "sha256": sha} for n, sha in zip(names, hashes, strict=True)}
