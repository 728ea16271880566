"""Reading run folders: which checkpoints a run has, and where its weights are.

runs/shapes-001/
    config.json            the config of the run
    command.txt            the command line that resumes it
    metrics.jsonl          one line per logged step
    loss.png, samples/     loss curves and sample images
    checkpoints/step_00001000/
        raw/, ema/         weights as trained and averaged, in safetensors files
        optimizer/         moments, likewise
        manifest.json      step, metrics, descriptions, config, sizes and hashes; written last
    checkpoints/frozen_<hash>/
                           frozen weights, shared by all checkpoints
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmdit.atomic import file_hash
from mmdit.bounds import LONGEST_JSON, parse_json, read_bounded
from mmdit.checkpoints.archive import Archive, open_file
from mmdit.checks import expanded
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.runs import native
from mmdit.runs import tensors as tensor_files
from mmdit.runs.native import Weights

T = TypeVar("T")
log = logger(__name__)
STEP_FOLDER = re.compile(r"step_\d{8,}")  # others are unfinished or damaged
WEIGHTS = ("ema", "raw")
FROZEN = "frozen"


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk, with the content of its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def finished(self) -> bool:
        """Whether it belongs to the last step of the run."""
        return bool(self.manifest["finished"])

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation."""
        return dict(self.manifest["figures"])

    def group(self, name: str) -> Path:
        """The folder of a group: 'raw', 'ema', 'optimizer' or 'frozen'.

        Frozen weights are shared by all checkpoints of a run; older versions wrote them into each
        checkpoint.
        """
        shared = self.manifest.get(FROZEN) if name == FROZEN else None
        return self.folder.with_name(str(shared["folder"])) if shared else self.folder / name

    def fault(self, group: str | None = None) -> str | None:
        """How the files differ from what was written; None if intact. Reads all bytes.

        Args:
            group: 'ema' or 'raw' (each with the frozen weights), 'optimizer' or 'frozen'; None
                checks all.
        """
        return self._inspect(group, lambda path: (None, file_hash(path)))[1]

    def read(self, group: str) -> Weights:
        """Read the tensors of a group, with the frozen ones; every byte is read once and verified.

        Args:
            group: as in `fault`.

        Raises:
            UserError: the group does not exist; a file is missing, or its content has changed.
        """
        found, fault = self._inspect(group, tensor_files.read_parts)
        if fault and not self.folder.is_dir():
            raise UserError(
                f"{self.folder} was deleted while it was read, by a run that keeps only its newest "
                "checkpoints (training.keep): run the command again"
            )
        if fault:
            raise UserError(
                f"checkpoint {self.folder} is damaged: {fault}; {self._what_else(fault)}"
            )
        described, hashes = self.manifest["descriptions"], self.manifest.get("weights_sha256", {})
        if group in WEIGHTS and group not in described:
            raise UserError(f"checkpoint {self.folder} holds no {group}")
        metadata = {"description": described[group]} if group in described else {}
        tensors = tensor_files.joined((part for parts in found for part in parts), self.folder)
        return Weights(self.folder / group, tensors, metadata, hashes.get(group))

    def _what_else(self, fault: str) -> str:
        """What to do about a fault: the frozen weights are those of older checkpoints, too."""
        if FROZEN in self.manifest and f"{(shared := self.group(FROZEN)).name}/" in fault:
            return (
                f"the checkpoints of a run share {shared}: copy the whole run, or restore that "
                "folder"
            )
        others = [f for f in step_folders(self.folder.parent.parent) if f.name < self.folder.name]
        return f"use an older one: {others[-1]}" if others else "there is no older one"

    def weights_sha256(self, group: str) -> str:
        """Hash of a group's tensors, with the frozen ones; see `Weights.sha256`.

        Manifests of older versions do not state it; it is then computed from the files.
        """
        stated: dict[str, str] = self.manifest.get("weights_sha256", {})
        return stated.get(group) or self.read(group).sha256

    def _inspect(
        self, group: str | None, read: Callable[[Path], tuple[T, str]]
    ) -> tuple[list[T], str | None]:
        """The results of `read` for each file, and how the files differ from what was written.

        Args:
            group: as in `fault`.
            read: returns something and the SHA-256 of the file.
        """
        expected = self._files()
        if group is None:
            folders = {path.parent for path in expected} | set(self.folder.glob("*"))
        else:
            names = {group, FROZEN} if group in WEIGHTS else {group}
            folders = {self.group(name) for name in names}
        paths = [path for path in expected if path.parent in folders]
        with ThreadPoolExecutor(4) as threads:  # reading and hashing release the GIL
            results = list(threads.map(lambda path: _inspect(path, expected[path], read), paths))
        faults = [
            f"{_name(path)} {fault}"
            for path, (_, fault) in zip(paths, results, strict=True)
            if fault
        ]
        there = {path for folder in folders for path in folder.glob("*.safetensors")}
        unexpected = sorted(map(_name, there - set(paths)))
        faults += [f"{name} is not part of it" for name in unexpected]
        return [found for found, _ in results if found is not None], "; ".join(faults) or None

    def _files(self) -> dict[Path, dict[str, Any]]:
        """Size and SHA-256 of each file, according to the manifest."""
        files = {self.folder / name: facts for name, facts in self.manifest["files"].items()}
        if shared := self.manifest.get(FROZEN):
            folder = self.folder.with_name(str(shared["folder"]))
            files |= {folder / name: facts for name, facts in shared["files"].items()}
        return files


def _name(path: Path) -> str:
    """Name of a checkpoint's file in messages: `ema/shard-00001-model-00001.safetensors`."""
    return f"{path.parent.name}/{path.name}"


def _inspect(
    path: Path, expected: Mapping[str, Any], read: Callable[[Path], tuple[T, str]]
) -> tuple[T | None, str | None]:
    """The result of `read` for a file, or what is wrong with the file."""
    changed = "does not have the content that was written (its SHA-256 differs)"
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return None, f"is {size} bytes, instead of {expected['bytes']} bytes"
        found, digest = read(path)
    except FileNotFoundError:
        return None, "is missing"
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    except UserError:  # its header is damaged
        return None, changed
    return (found, None) if digest == expected["sha256"] else (None, changed)


def sealed(facts: Mapping[str, Any]) -> bytes:
    """A manifest as bytes, including its own hash, so that any change is detected."""
    digest = hashlib.sha256(json.dumps(facts, indent=1).encode()).hexdigest()
    return json.dumps({"manifest_sha256": digest, **facts}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, which is written after all its other files.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        written = read_bounded(folder / "manifest.json", LONGEST_JSON)
        manifest: dict[str, Any] = dict(parse_json(written))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"checkpoint {folder} has no readable manifest.json ({error})") from error
    manifest.pop("manifest_sha256", None)
    if written != sealed(manifest):
        raise UserError(f"checkpoint {folder} is damaged: its manifest.json was changed")
    return manifest


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has the entries that are read, each of its kind."""
    kinds = {"step": int, "finished": bool, "figures": dict, "descriptions": dict, "config": dict}
    shared = manifest.get(FROZEN, {"folder": FROZEN, "files": {}})
    if not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        return False
    if not isinstance(shared, dict) or Path(str(shared.get("folder"))).name != shared.get("folder"):
        return False
    tables = (manifest.get("files"), shared.get("files"))
    return all(isinstance(table, dict) for table in tables) and all(
        isinstance(fact, dict) and {"bytes", "sha256"} <= fact.keys()
        for table in tables
        for fact in table.values()  # type: ignore[union-attr]
    )


def step_folders(run: Path) -> list[Path]:
    """The checkpoint folders of a run, intact or damaged, oldest step first."""
    found = [path for path in run.glob("checkpoints/step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint by its manifest; its tensors are not read.

    Raises:
        UserError: its manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    if not _is_complete(manifest):
        raise UserError(
            f"checkpoint {folder} was written by another version of mmdit: its manifest.json has "
            "other entries"
        )
    if STEP_FOLDER.fullmatch(folder.name) and number_of(folder) != manifest["step"]:
        raise UserError(
            f"checkpoint {folder} was written at step {manifest['step']}: the folder was renamed, "
            f"rename it to step_{manifest['step']:08d}"
        )
    return Checkpoint(folder, manifest)


def checkpoints_in(run: Path, *, warn: bool = True) -> list[Checkpoint]:
    """The checkpoints of a run, oldest step first; sorted by step, never by file time.

    One whose manifest is damaged is left out, with a warning if `warn` is on.

    Raises:
        UserError: there are checkpoints, but the manifests of all are damaged.
    """
    found, faults = [], []
    for folder in step_folders(run):
        try:
            found.append(open_checkpoint(folder))
        except UserError as error:
            faults.append(str(error))
    if faults and not found:
        raise UserError("; ".join(faults))
    for fault in faults if warn else ():
        log.warning("%s: ignoring it", fault)
    return found


def is_native(source: str | Path) -> bool:
    """Whether a path holds weights trained by this project: a run, a checkpoint or an export."""
    path = expanded(source)
    if path.suffix == ".safetensors" and path.is_file():
        return describes_module(open_file(path))
    return is_run_folder(path)


def is_run_folder(path: Path) -> bool:
    """Whether a folder is a run, a checkpoint, or a checkpoint's weights."""
    if (path / "model_index.json").is_file():  # of diffusers
        return False
    group = path.name in WEIGHTS and (path.parent / "manifest.json").is_file()
    return group or (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()


def describes_module(archive: Archive) -> bool:
    """Whether a file's header describes a module as `save_module` does: JSON that names a class.

    Other programs put prose there.
    """
    return '"class"' in archive.metadata.get("description", "")


def config_beside(path: Path) -> dict[str, Any]:
    """The config of the run whose weights are at this path; empty if there is none.

    Args:
        path: of a run, a checkpoint or its weights.
    """
    for folder in (path, *path.parents[:3]):
        if (folder / "config.json").is_file():
            config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            return config
    return {}


def read_weights(source: Path, weights: str = "ema") -> Weights:
    """Read the weights of a run, a checkpoint or an exported file, once, and verify them.

    For a run, these are the newest checkpoint with intact weights; damaged ones give a warning.

    Args:
        source: a run folder, a checkpoint folder, one of its groups, or an exported file.
        weights: 'ema' or 'raw', for runs and checkpoints.

    Raises:
        UserError: the source does not exist or is damaged.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights} must be ema or raw")
    if source.is_file():
        return Weights(source, *native.load_tensors(source))
    if not source.exists():
        raise UserError(f"checkpoint={source}: there is no such file or folder")
    if (source / "manifest.json").is_file():
        return open_checkpoint(source).read(weights)
    if source.name in WEIGHTS and (source.parent / "manifest.json").is_file():
        return open_checkpoint(source.parent).read(source.name)
    found = checkpoints_in(source)
    if not found:
        raise UserError(f"checkpoint={source}: that folder has no complete checkpoint")
    newest: UserError | None = None
    for checkpoint in reversed(found):
        try:
            chosen = checkpoint.read(weights)
        except UserError as error:
            if not checkpoint.folder.is_dir():  # training goes on, and keeps only the newest
                return read_weights(source, weights)
            newest = newest or error
        else:
            if newest:
                log.warning("%s. Using %s", newest, chosen.path)
            return chosen
    assert newest is not None
    raise newest


def newest_finished(root: Path) -> Path | None:
    """The text-to-image run that finished last, or None; runs of autoencoders do not count."""
    finished = []
    for run in runs_in(root):
        try:
            done = [c.manifest["finished_at"] for c in checkpoints_in(run) if c.finished]
            finished += [(time, run) for time in done]
        except UserError as error:
            log.warning("%s: ignoring the run", error)
    return max(finished)[1] if finished else None


def runs_in(root: Path) -> list[Path]:
    """The text-to-image runs below a folder, including subfolders, for names with a slash.

    A run is a folder with a `config.json` or a `scores.json`. Folders that cannot be read, and
    symbolic links below the first level, are left out.
    """
    return sorted(_runs_in(root, links=True))


def _runs_in(folder: Path, *, links: bool = False) -> Iterator[Path]:
    try:
        entries = [e.name for e in os.scandir(folder) if e.is_dir(follow_symlinks=links)]
    except OSError:
        return
    for path in (folder / name for name in entries):
        if (path / "config.json").is_file() or (path / "scores.json").is_file():
            yield path
        elif not (path / "checkpoints").is_dir():  # that is a stage, with no run inside
            yield from _runs_in(path)
