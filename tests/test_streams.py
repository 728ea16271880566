import errno
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdit.data.commands import command
from mmdit.streams import guarded
from tests.kills_for_tests import forked


def code_and_complaint(body: Callable[[], object], tmp_path: Path, out: int) -> tuple[int, str]:
    """Exit code and standard error of a process whose standard output is `out`."""

    def act() -> None:
        error = os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(error, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        try:
            body()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        sys.stdout.flush()
        sys.stderr.flush()

    code = os.waitstatus_to_exitcode(os.waitpid(forked(act), 0)[1])
    return code, (tmp_path / "stderr").read_text()


@pytest.fixture
def unread() -> int:
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def talk() -> None:
    """Twelve lines of a log, and twelve printed."""
    log = logging.Logger("talk")
    log.addHandler(logging.StreamHandler(sys.stdout))
    for i in range(12):
        log.warning("line %d", i)
        print(i)


def test_what_nobody_reads_ends_quietly(tmp_path, unread):
    def body() -> None:
        with guarded():
            talk()

    assert code_and_complaint(body, tmp_path, unread) == (141, "")


def test_lines_that_were_still_held_back_end_quietly_too(tmp_path, unread):
    def body() -> None:
        with guarded():
            print("one line, which Python writes at the end")

    assert code_and_complaint(body, tmp_path, unread) == (141, "")


def test_commands_end_quietly_too(tmp_path, unread):
    assert code_and_complaint(lambda: command(talk), tmp_path, unread) == (141, "")


def test_work_that_matters_more_goes_on_and_says_so_once(tmp_path, unread):
    def body() -> None:
        with guarded(lambda: True):
            talk()
            (tmp_path / "done").touch()

    code, told = code_and_complaint(body, tmp_path, unread)
    assert (code, told.count("\n")) == (0, 1) and (tmp_path / "done").exists()
    assert told == "standard output cannot be written (broken pipe): the run goes on without it\n"


def test_a_terminal_that_was_closed_does_not_end_a_training(tmp_path):
    def gone(text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def body() -> None:
        for name in ("stdout", "stderr"):
            lost = types.SimpleNamespace(write=gone, flush=lambda: gone(""), fileno=lambda: 1)
            setattr(sys, name, lost)
        with guarded(lambda: True):
            print("a line")
            print("a complaint", file=sys.stderr)
            os._exit(7)

    assert code_and_complaint(body, tmp_path, 1) == (7, "")


def test_a_full_disk_under_the_output_is_told_in_a_line(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)

    def body() -> None:
        with guarded():
            talk()

    told = "standard output cannot be written (no space left on device)\n"
    assert code_and_complaint(body, tmp_path, full) == (2, told)


def test_the_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with guarded():
        assert sys.stdout is not before[0] and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
