"""What `metrics.jsonl` holds is read again, whatever happened to it."""

import json
import logging
import math
from pathlib import Path

import pytest

from mmdit.engine.loggers import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file with the rows of four steps."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl", start_step=0)
    for step in range(1, 5):
        metrics.log(step, {"loss": 1 / step})
    metrics.close()
    return metrics.path


def resumed(path: Path, *, step: int = 4, every: int = 1) -> list[int]:
    """Steps of the lines that are kept when a run goes on."""
    MetricsFile(path, start_step=step, every=every).close()
    return [row["step"] for row in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize(
    "damaged",
    [
        *(b'{"step": 2, "lo', b"", b"[2]", b"2", b"null", b'{"loss": 0.5}', b'{"step": null}'),
        *(b'{"step": true}', b'{"step": "2"}', b'{"step": 2, "\xff": 1}', b"\x00\x00"),
    ],
)
def test_a_damaged_line_is_left_out_alone_and_told_of(
    path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[1] = damaged
    before = b"\n".join(lines)
    path.write_bytes(before)
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4]
    assert caplog.messages == [f"{path}: damaged lines, left out: 2"]
    caplog.clear()
    assert resumed(path) == [1, 3, 4]
    assert caplog.messages == [
        f"{path}: damaged lines, left out: 2; the file as it was is kept as metrics.jsonl.damaged"
    ]
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == before
    caplog.clear()
    assert resumed(path) == [1, 3, 4]
    assert not caplog.messages


def test_a_last_line_that_a_kill_cut_is_left_out_silently(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = path.read_bytes()
    last = len(whole.splitlines()[-1])
    with caplog.at_level(logging.WARNING):
        for cut in range(2, last + 1):
            path.write_bytes(whole[:-cut])
            assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
        assert resumed(path, step=3) == [1, 2, 3]
    assert not caplog.messages
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')  # as they were written once
    metrics = MetricsFile(path, start_step=1)
    metrics.log(2, {"loss": math.nan, "gradient_norm": math.inf, "lr": 0.5})
    metrics.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "gradient_norm": None, "lr": 0.5},
    ]
    assert read_metrics(path) == rows


def test_rows_missing_before_the_step_that_a_run_goes_on_from_are_reported(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])  # cut in the middle of the file
    assert resumed(path) == [1]
    assert caplog.messages == [
        f"{path}: the last row before step 4, from which the run goes on, is that of step 1: the "
        "rows between were lost"
    ]
    caplog.clear()
    path.unlink()
    assert resumed(path, every=5) == []  # none was due
    assert not caplog.messages
    assert resumed(path, every=4) == []
    assert "step 4, from which the run goes on, is that of step 0" in caplog.text


def test_rows_that_are_made_again_are_counted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert resumed(path, step=2) == [1, 2]
    assert caplog.messages == [f"{path}: rows after step 2, made again now: 2"]


def test_thousands_of_damaged_lines_are_told_of_in_one_line(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with path.open("ab") as file:
        file.write(b"[" * 10_000 + b"\n" + b"\x1b[2J\n" * 20_000)
    assert resumed(path) == [1, 2, 3, 4]
    assert len(caplog.messages) == 1
    assert "left out: 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 and 19991 more;" in caplog.text
