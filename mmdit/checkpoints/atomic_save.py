"""Replace a folder of saved models atomically: all of it, or nothing."""

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
    """A new folder to write in, which replaces `folder` once everything is written.

    What an earlier save left in `folder`, or what has the name of a new file, is removed; other
    files stay. If anything fails, or the process is killed at any moment, `folder` is complete:
    either as it was before or as it has just been written.

    Args:
        folder: where the models are to be saved.
        pipeline: True if a whole pipeline is written, False if a single model is.

    Raises:
        UserError: `folder` cannot be written to, or holds something else that would be lost.
    """
    folder = folder.resolve()
    try:
        with scratch(folder) as beside:  # also undoes an earlier save that was killed half-way
            expect_replaceable(folder, pipeline=pipeline)
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
            with suppress(OSError):  # it is saved, even if it might not survive a power cut yet
                flush(folder.parent)
            if new.is_dir():  # the old folder by now: keep what was put into it in the meantime
                share(new, folder, leave=leave)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error})") from None


def expect_replaceable(folder: Path, *, pipeline: bool) -> None:
    """Refuse to save where that would remove files that no save of the same kind has written.

    Raises:
        UserError: it would.
    """
    holds_pipeline = (folder / "model_index.json").is_file()
    if holds_pipeline and not pipeline:
        raise UserError(
            f"{folder} holds a whole pipeline: save one model in a subfolder of it, as "
            f"{folder / 'transformer'}, or elsewhere"
        )
    there = sorted(name for name in LAYOUT if (folder / name).exists())
    if pipeline and there and not holds_pipeline:
        raise UserError(
            f"{folder} holds {there[0]} and no model_index.json, so it is not a saved pipeline: "
            "save elsewhere, or move these files away"
        )


def share(old: Path, new: Path, *, leave: Collection[str] = ()) -> None:
    """Add the contents of one folder to another, as hard links where the file system has them.

    Files that the new folder already holds are not replaced.

    Args:
        old: folder whose contents are added.
        new: folder they are added to; created if it does not exist.
        leave: names in `old` that are skipped.
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
    with suppress(OSError):  # only the superuser may change the owner
        owner = old.stat()
        os.chown(new, owner.st_uid, owner.st_gid)


def sync(folder: Path) -> None:
    """Flush everything in a folder to disk, so that it survives a power cut."""
    for here, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(here, name), "rb") as file:
                os.fsync(file.fileno())
        flush(Path(here))
