"""Run folders, read: which checkpoints a run has, and where its weights are.

runs/shapes-001/
    config.json            what was run
    command.txt            the command line that goes on with it
    metrics.jsonl          one line per logged step
    loss.png, samples/     to look at
    checkpoints/step_00001000/
        raw/, ema/         weights as trained and averaged, in files of tensors or parts of them
        optimizer/         its moments, likewise
        manifest.json      step, metrics, descriptions, config, sizes and hashes; written last
    checkpoints/frozen_<hash>/
                           weights that nobody trains, which all checkpoints share
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmdit.bounds import LONGEST_JSON, parse_json, read_bounded
from mmdit.checkpoints.archive import Archive, open_file
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.runs import native
from mmdit.runs import tensors as tensor_files
from mmdit.runs.native import Weights

T = TypeVar("T")
log = logger(__name__)
STEP_FOLDER = re.compile(r"step_\d{8,}")  # others are being written, or were set aside
WEIGHTS = ("ema", "raw")
FROZEN = "frozen"


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk, and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def finished(self) -> bool:
        """Whether it is that of the run's last step."""
        return bool(self.manifest["finished"])

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation."""
        return dict(self.manifest["figures"])

    def group(self, name: str) -> Path:
        """The folder of a group: 'raw', 'ema', 'optimizer' or 'frozen'.

        The last holds the weights that nobody trains. All checkpoints of a run share it; older
        versions wrote it into each of them.
        """
        shared = self.manifest.get(FROZEN) if name == FROZEN else None
        return self.folder.with_name(str(shared["folder"])) if shared else self.folder / name

    def fault(self, group: str | None = None) -> str | None:
        """What is not as it was written; None if nothing. Reads all bytes.

        Args:
            group: 'ema', 'raw' (with what is frozen), 'optimizer' or 'frozen'; None is all of them.
        """
        return self._look(group, lambda path: (None, native.file_hash(path)))[1]

    def read(self, group: str) -> Weights:
        """The tensors of a group and what is frozen; every byte is read once, and verified.

        Args:
            group: as in `fault`.

        Raises:
            UserError: there is no such group; a file is missing, or its content has changed.
        """
        found, fault = self._look(group, tensor_files.read_parts)
        if fault and not self.folder.is_dir():
            raise UserError(
                f"{self.folder} was deleted while it was read, by a run that keeps only its newest "
                "checkpoints (training.keep): give the command again"
            )
        if fault:
            others = [
                f for f in step_folders(self.folder.parent.parent) if f.name < self.folder.name
            ]
            hint = f"use an older one: {others[-1]}" if others else "there is no older one"
            raise UserError(f"checkpoint {self.folder} is damaged: {fault}; {hint}")
        described, hashes = self.manifest["descriptions"], self.manifest.get("weights_sha256", {})
        if group in WEIGHTS and group not in described:
            raise UserError(f"checkpoint {self.folder} holds no {group}")
        metadata = {"description": described[group]} if group in described else {}
        tensors = tensor_files.joined((part for parts in found for part in parts), self.folder)
        return Weights(self.folder / group, tensors, metadata, hashes.get(group))

    def weights_sha256(self, group: str) -> str:
        """Hash of a group's tensors, with what is frozen; see `Weights.sha256`.

        Older manifests do not state it: the files are read then.
        """
        stated: dict[str, str] = self.manifest.get("weights_sha256", {})
        return stated.get(group) or self.read(group).sha256

    def _look(
        self, group: str | None, read: Callable[[Path], tuple[T, str]]
    ) -> tuple[list[T], str | None]:
        """What `read` gives of each file, with its SHA-256, and what is not as it was written."""
        expected = self._files()
        if group is None:
            folders = {path.parent for path in expected} | set(self.folder.glob("*"))
        else:
            names = {group, FROZEN} if group in WEIGHTS else {group}
            folders = {self.group(name) for name in names}
        paths = [path for path in expected if path.parent in folders]
        with ThreadPoolExecutor(4) as threads:  # reading and hashing leave Python to others
            looked = list(threads.map(lambda path: _look(path, expected[path], read), paths))
        faults = [
            f"{_name(path)} {fault}"
            for path, (_, fault) in zip(paths, looked, strict=True)
            if fault
        ]
        there = {path for folder in folders for path in folder.glob("*.safetensors")}
        more = sorted(map(_name, there - set(paths)))
        faults += [f"{name} is not part of it" for name in more]
        return [found for found, _ in looked if found is not None], "; ".join(faults) or None

    def _files(self) -> dict[Path, dict[str, Any]]:
        """Size and SHA-256 of each file, as the manifest has them."""
        files = {self.folder / name: facts for name, facts in self.manifest["files"].items()}
        if shared := self.manifest.get(FROZEN):
            folder = self.folder.with_name(str(shared["folder"]))
            files |= {folder / name: facts for name, facts in shared["files"].items()}
        return files


def _name(path: Path) -> str:
    """A file of a checkpoint as messages call it: `ema/shard-00001-model-00001.safetensors`."""
    return f"{path.parent.name}/{path.name}"


def _look(
    path: Path, expected: Mapping[str, Any], read: Callable[[Path], tuple[T, str]]
) -> tuple[T | None, str | None]:
    """What `read` gives of a file, or what is wrong with it."""
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
    """A manifest as bytes, with its own hash, so that no byte of it can change unseen."""
    digest = hashlib.sha256(json.dumps(facts, indent=1).encode()).hexdigest()
    return json.dumps({"manifest_sha256": digest, **facts}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Facts of a checkpoint folder, written after all its other files.

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


def step_folders(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or damaged, oldest step first."""
    found = [path for path in run.glob("checkpoints/step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(folder: Path) -> int:
    """The step that the name of a checkpoint folder says."""
    return int(folder.name.removeprefix("step_"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint folder says of itself.

    Raises:
        UserError: its manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    if STEP_FOLDER.fullmatch(folder.name) and number_of(folder) != manifest["step"]:
        raise UserError(
            f"checkpoint {folder} is that of step {manifest['step']}: its name was changed"
        )
    return Checkpoint(folder, manifest)


def checkpoints_in(run: Path, *, warn: bool = True) -> list[Checkpoint]:
    """The checkpoints of a run, oldest step first; found by manifest, never by clock.

    One whose manifest is damaged is left out, and named in a warning if `warn` is on.

    Raises:
        UserError: there are some, and the manifests of all are damaged.
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
        log.warning("%s: it does not count", fault)
    return found


def is_native(source: str | Path) -> bool:
    """Whether a source was written by this project's training: a run, a checkpoint, its weights."""
    path = Path(source).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        return describes_module(open_file(path))
    return is_run_folder(path)


def is_run_folder(path: Path) -> bool:
    """Whether a folder is a run, a checkpoint, or a checkpoint's weights."""
    run = (path / "checkpoints").is_dir() and not (path / "model_index.json").is_file()
    group = path.name in WEIGHTS and (path.parent / "manifest.json").is_file()
    return run or group or (path / "manifest.json").is_file()


def describes_module(archive: Archive) -> bool:
    """Whether a file's header describes a module as `save_module` does: JSON that names a class.

    Others put prose there.
    """
    return '"class"' in archive.metadata.get("description", "")


def read_weights(source: Path, weights: str = "ema") -> Weights:
    """The weights of a run, a checkpoint or an exported file; read once, verified on the way.

    Of a run, the newest checkpoint whose weights are undamaged; a damaged one is named in a
    warning.

    Args:
        source: a run folder, a checkpoint folder, one of its groups, or an exported file.
        weights: 'ema' or 'raw', for runs and checkpoints.

    Raises:
        UserError: nothing is there, or what is there is damaged.
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
    """The text-to-image run that was finished last; autoencoders are no such runs."""
    finished = []
    for run in runs_in(root):
        try:
            done = [c.manifest["finished_at"] for c in checkpoints_in(run) if c.finished]
            finished += [(time, run) for time in done]
        except UserError as error:
            log.warning("%s: the run does not count", error)
    return max(finished)[1] if finished else None


def runs_in(root: Path) -> list[Path]:
    """The text-to-image runs below a folder, in subfolders too, where names with a slash lie.

    A run is a folder with a `config.json` or a `scores.json`. Folders that cannot be read, and
    linked ones below the first level, are left out.
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
        elif not (path / "checkpoints").is_dir():  # which a stage has, and no run within
            yield from _runs_in(path)
