"""Run folders, read: which checkpoints a run has, and where its weights are.

runs/shapes-001/
    config.json            what was run
    metrics.jsonl          one line per logged step
    loss.png, samples/     to look at
    checkpoints/step_00001000/
        ema.safetensors, raw.safetensors    modules, complete with their description
        optimizer.safetensors               AdamW's moments
        manifest.json                       step, figures, sizes and hashes; written last
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.checkpoints.native import file_hash
from mmdit.errors import UserError


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    finished: bool
    figures: dict[str, float]  # of the last evaluation

    def verified(self, name: str) -> Path:
        """Path of one of its files, after comparing it with the manifest.

        Raises:
            UserError: the file is missing, or its content has changed since it was written.
        """
        path = self.folder / name
        expected = read_manifest(self.folder)["files"][name]
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            size = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            fault = f"is {size}, instead of {expected['bytes']} bytes"
        elif file_hash(path) != expected["sha256"]:
            fault = "does not have the content that was written (its SHA-256 differs)"
        else:
            return path
        others = [c.folder for c in checkpoints_in(self.folder.parent.parent) if c != self]
        hint = f"use an older one: {others[-1]}" if others else "there is no other in this run"
        raise UserError(f"checkpoint {self.folder} is damaged: {name} {fault}; {hint}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Facts of a checkpoint folder, written after all its other files."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return manifest
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} has no readable manifest.json ({error})") from error


def checkpoints_in(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest step first; found by manifest, never by clock."""
    found = []
    for manifest in sorted(run.glob("checkpoints/step_*/manifest.json")):
        if not manifest.parent.name.endswith(".tmp"):
            content = read_manifest(manifest.parent)
            facts = (content[name] for name in ("step", "finished", "figures"))
            found.append(Checkpoint(manifest.parent, *facts))
    return found


def weights_file(source: Path, weights: str = "ema") -> Path:
    """The file that holds the weights of a run folder, of a checkpoint folder, or the file itself.

    Args:
        source: any of the three.
        weights: 'ema' or 'raw', for the folders.

    Raises:
        UserError: nothing is there, or what is there is damaged.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights} must be ema or raw")
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"checkpoint={source}: there is no such file or folder")
    if (source / "manifest.json").is_file():
        found = [c for c in checkpoints_in(source.parent.parent) if c.folder == source]
    else:
        found = checkpoints_in(source)
    if not found:
        raise UserError(f"checkpoint={source}: that folder has no complete checkpoint")
    return found[-1].verified(f"{weights}.safetensors")


def newest_finished(root: Path) -> Path | None:
    """The text-to-image run that was finished last; autoencoders are no such runs."""
    finished = []
    for run in root.glob("*"):
        if (run / "config.json").is_file():
            done = [c.folder for c in checkpoints_in(run) if c.finished]
            finished += [(read_manifest(folder)["finished_at"], run) for folder in done]
    return max(finished)[1] if finished else None
