import itertools
import os
import re

import pytest

from mmdit.runs.files import NumberedFiles
from tests.kills_for_tests import changes_of, forked, killed_at


def test_numbers_continue_after_existing_files(tmp_path):
    (tmp_path / "00007-a.png").touch()
    (tmp_path / "notes.txt").touch()
    files = NumberedFiles(tmp_path)
    added = [files.add("b.png", b"b").name for _ in range(2)]
    assert added == ["00008-b.png", "00009-b.png"] and files.first == 8
    assert files.add("grid.png", b"grid", first=files.first).name == "00008-grid.png"
    NumberedFiles(tmp_path).add("of another process.png", b"")
    assert files.add("b.png", b"b").name == "00011-b.png"


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_add_to_one_folder_lose_nothing(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError()))

    def fill(who: int) -> None:
        files = NumberedFiles(tmp_path)
        for i in range(8):
            files.add("same.png", bytes([who, i]))
        files.add("grid.png", bytes([who]), first=files.first)

    children = [forked(lambda who=who: fill(who)) for who in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    found = [path.read_bytes() for path in tmp_path.glob("*-same.png")]
    assert sorted(found) == sorted(bytes(pair) for pair in itertools.product(range(4), range(8)))
    assert len(list(tmp_path.glob("*-grid.png"))) == 4
    numbers = [re.match(r"\d+", path.name)[0] for path in tmp_path.glob("*-same.png")]
    assert len(set(numbers)) == 32


def test_a_kill_leaves_a_complete_file_or_none(tmp_path):
    def write() -> None:
        NumberedFiles(tmp_path).add("x.png", b"whole")

    for moment in range(1, changes_of(write)):
        killed_at(moment, write)
        assert {path.read_bytes() for path in tmp_path.glob("*-x.png")} <= {b"whole"}
    write()
    assert all(path.name.endswith("-x.png") for path in tmp_path.iterdir())
