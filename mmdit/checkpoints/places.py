"""Where models are saved: all of a saving takes its place, or nothing does."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmdit.checkpoints.folders import LAYOUT, WEIGHTS_WRITTEN
from mmdit.errors import UserError


@contextmanager
def replacing(folder: Path, *, pipeline: bool) -> Iterator[Path]:
    """A folder to write in, whose content takes its place in `folder` when all is written.

    What was there under the same names, or was left by an earlier saving, goes; other files stay.
    Where anything fails, all of it stays.

    Args:
        pipeline: whether a whole pipeline is written, or one model.

    Raises:
        UserError: the place cannot be written to, or holds something else that would be lost.
    """
    folder = folder.resolve()
    check_place(folder, pipeline=pipeline)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error})") from None
    new, old = beside / "new", beside / "old"
    try:
        new.mkdir()
        old.mkdir()
        yield new
        folder.mkdir(exist_ok=True)
        written = {item.name for item in new.iterdir()}
        left = LAYOUT if pipeline else set(filter(WEIGHTS_WRITTEN.fullmatch, os.listdir(folder)))
        exchange(folder, sorted(written), sorted(left | written), new=new, old=old)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
            f"{folder} holds {there[0]} and no model_index.json, so that it is no saved pipeline: "
            "save elsewhere, or remove what is in the way"
        )


def exchange(
    folder: Path, written: Sequence[str], removed: Sequence[str], *, new: Path, old: Path
) -> None:
    """Move `removed` out of a folder to `old`, `written` into it from `new`; all or nothing."""
    moves = [(folder / name, old / name) for name in removed if os.path.lexists(folder / name)]
    moves += [(new / name, folder / name) for name in written]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except OSError:
        for source, target in reversed(done):
            target.rename(source)
        raise
