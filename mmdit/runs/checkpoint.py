"""Run folders, read: which checkpoints a run has, and where its weights are.

runs/shapes-001/
    config.json            what was run
    command.txt            the command line that goes on with it
    metrics.jsonl          one line per logged step
    loss.png, samples/     to look at
    checkpoints/step_00001000/
        raw/, ema/         weights as trained and averaged, in files of tensors or parts of them
        frozen/            those that both share, since nobody trains them
        optimizer/         its moments, likewise
        manifest.json      step, figures, descriptions, config, sizes and hashes; written last
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmdit.bounds import LONGEST_JSON, parse_json, read_bounded
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.building import filled
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.runs import native
from mmdit.runs import tensors as tensor_files

log = logger(__name__)
STEP_FOLDER = re.compile(r"step_\d{8,}")  # others are being written, or were set aside
WEIGHTS = ("ema", "raw")
FROZEN = "frozen"


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    finished: bool
    figures: dict[str, float]  # of the last evaluation

    def fault(self, group: str | None = None) -> str | None:
        """What is not as it was written; None if nothing. Reads all bytes.

        Args:
            group: 'ema', 'raw' (with what is frozen) or 'optimizer'; None is all of them.

        Raises:
            UserError: the manifest is damaged.
        """
        groups = {group, FROZEN} if group in WEIGHTS else {group}
        files: dict[str, Any] = {
            name: expected
            for name, expected in read_manifest(self.folder)["files"].items()
            if group is None or name.partition("/")[0] in groups
        }
        with ThreadPoolExecutor(4) as threads:  # hashing leaves Python to others
            faults = threads.map(lambda name: _fault(self.folder / name, files[name]), files)
            told = [f"{n} {fault}" for n, fault in zip(files, faults, strict=True) if fault]
        there = [
            path
            for path in self.folder.glob("*/*.safetensors")
            if group is None or path.parent.name in groups
        ]
        told += [
            f"{name} is no part of it"
            for name in sorted(path.relative_to(self.folder).as_posix() for path in there)
            if name not in files
        ]
        return "; ".join(told) or None

    def verified(self, group: str) -> Path:
        """Folder of one of its groups, after comparing the files with the manifest.

        Raises:
            UserError: there is no such group; a file is missing, or its content has changed.
        """
        if fault := self.fault(group):
            others = [
                f for f in step_folders(self.folder.parent.parent) if f.name < self.folder.name
            ]
            hint = f"use an older one: {others[-1]}" if others else "there is no older one"
            raise UserError(f"checkpoint {self.folder} is damaged: {fault}; {hint}")
        if not (self.folder / group).exists():
            raise UserError(f"checkpoint {self.folder} holds no {group}")
        return self.folder / group


def _fault(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"is {size} bytes, instead of {expected['bytes']} bytes"
        if native.file_hash(path) != expected["sha256"]:
            return "does not have the content that was written (its SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


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
    return Checkpoint(folder, *(manifest[name] for name in ("step", "finished", "figures")))


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
    if path.is_dir():
        run = (path / "checkpoints").is_dir() and not (path / "model_index.json").is_file()
        group = path.name in WEIGHTS and (path.parent / "manifest.json").is_file()
        return run or group or (path / "manifest.json").is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    # As `save_module` writes it: JSON that names a class. Others put prose there.
    return '"class"' in open_file(path).metadata.get("description", "")


def find_weights(source: Path, weights: str = "ema") -> Path:
    """The folder that holds the weights of a run or of a checkpoint, verified; or a file itself.

    Of a run, the newest checkpoint whose weights are undamaged; a damaged one is named in a
    warning.

    Args:
        source: a run folder, a checkpoint folder, a folder that this gave, or an exported file.
        weights: 'ema' or 'raw', for runs and checkpoints.

    Raises:
        UserError: nothing is there, or what is there is damaged.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights} must be ema or raw")
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"checkpoint={source}: there is no such file or folder")
    if (source / "manifest.json").is_file():
        return open_checkpoint(source).verified(weights)
    if source.name in WEIGHTS and (source.parent / "manifest.json").is_file():
        return open_checkpoint(source.parent).verified(source.name)
    found = checkpoints_in(source)
    if not found:
        raise UserError(f"checkpoint={source}: that folder has no complete checkpoint")
    newest: UserError | None = None
    for checkpoint in reversed(found):
        try:
            chosen = checkpoint.verified(weights)
        except UserError as error:
            if not checkpoint.folder.is_dir():  # training goes on, and keeps only the newest
                return find_weights(source, weights)
            newest = newest or error
        else:
            if newest:
                log.warning("%s. Using %s", newest, chosen)
            return chosen
    assert newest is not None
    raise newest


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of what `find_weights` gave, on the CPU.

    Raises:
        UserError: they cannot be read.
    """
    if path.is_file():
        return native.load_tensors(path)[0]
    with _while_it_is_there(path):
        parts = [tensor_files.read(folder) for folder in _folders(path)]
        return {key: tensor for part in parts for key, tensor in part.items()}


def _folders(path: Path) -> list[Path]:
    """Where the tensors of a group lie: in its folder, and in that of what both groups share."""
    frozen = path.parent / FROZEN
    return [frozen, path] if path.name in WEIGHTS and frozen.is_dir() else [path]


@contextmanager
def _while_it_is_there(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if path.is_dir():
            raise
        raise UserError(
            f"{path} was deleted while it was read, by a run that keeps only its newest "
            "checkpoints (training.keep): give the command again"
        ) from error


def load_model(path: Path, change: native.Change | None = None) -> nn.Module:
    """The module that `find_weights` gave the place of; in eval mode, on the CPU.

    Args:
        change: what else its description is to say.

    Raises:
        UserError: it cannot be read, or does not fit its own description.
    """
    if path.is_file():
        return native.load_module(path, change)
    description = description_of(path)
    if change is not None:
        description = change(description)
    with _while_it_is_there(path):
        found = {key: fact for f in _folders(path) for key, fact in tensor_files.facts(f).items()}
    native.check_description(description, found, path)
    return filled(description, load_weights(path), path)


def description_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the module in one of its folders.

    Raises:
        UserError: nothing, or the manifest is damaged.
    """
    described: dict[str, Any] = read_manifest(path.parent)["descriptions"]
    if path.name not in described:
        raise UserError(f"checkpoint {path.parent} describes no module {path.name}")
    return dict(described[path.name])


def hash_of_weights(path: Path) -> str:
    """SHA-256 of the weights that `find_weights` gave the place of, in hexadecimal.

    That of `weights_hash`: the same however many processes wrote them, and in an exported file.

    Raises:
        UserError: they cannot be read.
    """
    return native.tensors_hash(load_weights(path))


def newest_finished(root: Path) -> Path | None:
    """The text-to-image run that was finished last; autoencoders are no such runs."""
    finished = []
    for run in runs_in(root):
        try:
            done = [c.folder for c in checkpoints_in(run) if c.finished]
            finished += [(read_manifest(folder)["finished_at"], run) for folder in done]
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
