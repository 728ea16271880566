"""Where models are saved: all of a saving takes its place, or nothing does."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmdit.atomic import NEW, clear, flush, replace_folder, scratch
from mmdit.checkpoints.folders import LAYOUT, WEIGHTS_WRITTEN
from mmdit.errors import UserError


@contextmanager
def replacing(folder: Path, *, pipeline: bool) -> Iterator[Path]:
    """A folder to write in, which takes the place of `folder` when all is written.

    What was there under the same names, or was left by an earlier saving, goes; other files stay.
    Where anything fails, or the process is killed at any moment, `folder` is whole: as it was, or
    as it is written now.

    Args:
        pipeline: whether a whole pipeline is written, or one model.

    Raises:
        UserError: the place cannot be written to, or holds something else that would be lost.
    """
    folder = folder.resolve()
    try:
        with scratch(folder) as beside:  # which undoes a saving that was killed half-way
            check_place(folder, pipeline=pipeline)
            new = beside / NEW
            new.mkdir()
            yield new
            sync(new)
            if not folder.is_dir():
                new.rename(folder)
                return
            clear(folder)
            ours = LAYOUT if pipeline else filter(WEIGHTS_WRITTEN.fullmatch, os.listdir(folder))
            leave = {*ours, *os.listdir(new)}
            share(folder, new, leave=leave)
            replace_folder(beside, folder)
            with suppress(OSError):  # it has been saved, if not yet for a power cut
                flush(folder.parent)
            if new.is_dir():  # the old folder now: what was put into it meanwhile stays, too
                share(new, folder, leave=leave)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error})") from None


def check_place(folder: Path, *, pipeline: bool) -> None:
    """Refuse to save where that would remove what no saving of the same kind has left."""
    whole = (folder / "model_index.json").is_file()
    if whole and not pipeline:
        raise UserError(
            f"{folder} holds a whole pipeline: save one model in a subfolder of it, as "
            f"{folder / 'transformer'}, or elsewhere"
        )
    there = sorted(name for name in LAYOUT if (folder / name).exists())
    if pipeline and there and not whole:
        raise UserError(
            f"{folder} holds {there[0]} and no model_index.json, so it is not a saved pipeline: "
            "save elsewhere, or move what is in the way"
        )


def share(old: Path, new: Path, *, leave: Collection[str] = ()) -> None:
    """Let a folder hold what another holds, too; without copies where the disk has hard links.

    Args:
        leave: names that are left out. Files that the new folder has stay as they are there.
    """
    new.mkdir(exist_ok=True)
    for item in os.scandir(old):
        target = new / item.name
        if item.name in leave or (
            os.path.lexists(target) and not item.is_dir(follow_symlinks=False)
        ):
            continue
        if item.is_dir(follow_symlinks=False):
            share(Path(item.path), target)
        elif item.is_symlink():
            target.symlink_to(os.readlink(item.path))
        else:
            try:
                os.link(item.path, target)
            except OSError:
                shutil.copy2(item.path, target)
    shutil.copystat(old, new)
    with suppress(OSError):  # to give a folder away is for the superuser
        owner = old.stat()
        os.chown(new, owner.st_uid, owner.st_gid)


def sync(folder: Path) -> None:
    """Make all that a folder holds survive a power cut."""
    for here, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(here, name), "rb") as file:
                os.fsync(file.fileno())
        flush(Path(here))
