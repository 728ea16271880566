import errno
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmdit import atomic
from mmdit.atomic import claim, clear, replace_folder, scratch, whole_file, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def forked(body: Callable[[], object]) -> int:
    """Start a process that does something and is then killed; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return child


def killed(place: Path) -> None:
    """Simulate a writer of `place` that was killed."""

    def write() -> None:
        with scratch(place) as beside:
            (beside / "new").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(forked(write), 0)
    assert any(name.endswith(".tmp") for name in names(place.parent))


def test_many_processes_can_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "new" / "file"
    contents = [bytes([i]) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: write_atomically(path, data), contents * 5))
    assert path.read_bytes() in contents
    assert names(path.parent) == ["file"]


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"before")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(json.dumps("after").encode())
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["file"]


def test_the_next_writer_clears_what_a_killed_one_left(tmp_path):
    killed(tmp_path / "file")
    write_atomically(tmp_path / "other", b"another place")
    assert any(name.endswith(".tmp") for name in names(tmp_path))
    write_atomically(tmp_path / "file", b"whole")
    assert names(tmp_path) == ["file", "other"]


def test_clear_removes_only_abandoned_scratch_folders(tmp_path):
    killed(tmp_path / "file")
    for name in (".mine.0.tmp", ".a_folder.0.tmp/lock", ".a_folder_of_mine.0.tmp/notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with scratch(tmp_path / "living") as beside:
        (beside / "new").touch()
        clear(tmp_path)
        assert names(beside) == ["lock", "new"]
        assert names(tmp_path) == [".a_folder_of_mine.0.tmp", ".living.0.tmp", ".mine.0.tmp"]


def test_a_living_writer_keeps_its_scratch_folder_when_others_write(tmp_path):
    path = tmp_path / "file"
    begun, tell = os.pipe()

    def write() -> None:
        with scratch(path):
            os.write(tell, b"writing")
            time.sleep(60)

    writer = forked(write)
    os.read(begun, 7)
    for _ in range(3):
        write_atomically(path, b"whole")
    assert names(tmp_path) == [".file.0.tmp", "file"]
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    write_atomically(path, b"whole")
    assert names(tmp_path) == ["file"]


def test_a_forked_process_does_not_hold_its_parents_locks(tmp_path):
    begun, tell = os.pipe()
    with scratch(tmp_path / "file") as beside:
        child = forked(lambda: (os.write(tell, b"x"), time.sleep(60)))
        os.read(begun, 1)
        left = beside.rename(tmp_path / ".left.0.tmp")
    try:
        clear(tmp_path)
        assert not left.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_exactly_one_of_many_processes_claims_a_name(tmp_path):
    def attempt(i: int) -> bool:
        return claim(tmp_path / "file", bytes([i]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(40)))
    assert won.count(True) == 1
    assert (tmp_path / "file").read_bytes() == bytes([won.index(True)]) * 1000
    assert names(tmp_path) == ["file"]


def test_a_name_can_be_claimed_without_hard_links(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert claim(tmp_path / "file", b"one")
    assert not claim(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"one"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_by_another(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    place = tmp_path / "place"
    place.mkdir()
    (place / "old").touch()
    with scratch(place) as beside:
        (beside / "new").mkdir()
        (beside / "new" / "file").touch()
        replace_folder(beside, place)
    assert names(place) == ["file"] and names(tmp_path) == ["place"]


@pytest.mark.parametrize("again", [clear, lambda folder: write_atomically(folder / "place", b"")])
def test_two_renames_that_were_interrupted_are_undone(tmp_path, monkeypatch, again):
    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    place, rename = tmp_path / "place", Path.rename
    place.mkdir()
    (place / "old").touch()

    def once(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", once)
        killed.setattr(atomic, "_remove", lambda folder: None)
        with pytest.raises(KeyboardInterrupt), scratch(place) as beside:
            (beside / "new").mkdir()
            replace_folder(beside, place)
    assert not place.exists()
    if again is clear:
        clear(tmp_path)
    else:
        with pytest.raises(IsADirectoryError):
            again(tmp_path)
    assert names(place) == ["old"] and names(tmp_path) == ["place"]


def test_an_error_names_the_target_and_not_the_scratch_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "folder", b"")
    assert caught.value.filename == str(tmp_path / "folder")
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_file_with_a_long_name_can_be_written(tmp_path):
    write_atomically(tmp_path / ("x" * 255), b"whole")
    assert names(tmp_path) == ["x" * 255]
