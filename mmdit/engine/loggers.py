"""Where figures go: always to `metrics.jsonl` and a plot, and to W&B if asked."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from mmdit.atomic import write_atomically
from mmdit.plots import LOSSES, Curves
from mmdit.printable import logger
from mmdit.runs.files import unused, writing

log = logger(__name__)
Row: TypeAlias = dict[str, Any]  # figures by name, or None where one was not finite; and the step


class Logger(Protocol):
    """A place that receives figures and pictures."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Called once, before the first step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures after `step` steps."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture written after `step` steps."""

    def close(self) -> None:
        """Called once, at the end, whatever the end was."""


class NoLogger:
    """Nowhere but the run folder: the default."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        pass

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def picture(self, step: int, name: str, path: Path) -> None:
        pass

    def close(self) -> None:
        pass


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with its step; null where none is finite.

    On resume, rows of steps that will be made again are dropped, and every other row that can be
    read is kept. A file with damaged lines is kept as `metrics.jsonl.damaged`.

    Args:
        path: of the file.
        start_step: number of steps already made.
        every: steps between two rows, by which rows that are missing at the end are noticed.

    Attributes:
        curves: what `plot_losses` draws of all rows.

    Raises:
        UserError: here and in `log`, the disk is full or the folder cannot be written to.
    """

    def __init__(self, path: Path, *, start_step: int, every: int = 1) -> None:
        self.path, self.curves = path, Curves(LOSSES)
        kept, damaged, later, last = list[str](), list[int](), 0, 0
        for number, row in _lines(path):
            if row is None:
                damaged.append(number)
            elif row["step"] > start_step:
                later += 1
            else:
                kept.append(json.dumps(row) + "\n")
                self.curves.add(row)
                last = row["step"]
        with writing(path, path.parent):
            if damaged:
                copy = unused(path.with_name(f"{path.name}.damaged"))
                shutil.copyfile(path, copy)
                log.warning("%s; the file as it was is kept as %s", _told(path, damaged), copy.name)
            write_atomically(path, "".join(kept).encode())
            self._file = path.open("a")
        if last + every <= start_step:
            log.warning(
                "%s: the last row before step %d, from which the run goes on, is that of step %d: "
                "the rows between were lost",
                *(path, start_step, last),
            )
        if later:
            log.info("%s: rows after step %d, made again now: %d", path, start_step, later)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line."""
        row: Row = {"step": step, **finite(figures)}
        self.curves.add(row)
        with writing(self.path, self.path.parent):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Nothing is logged after this."""
        self._file.close()


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """None for figures that are not finite: JSON knows no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics file; damaged lines are left out, and a last one cut short by a kill."""
    rows, damaged = [], []
    for number, row in _lines(path):
        if row is None:
            damaged.append(number)
        else:
            rows.append(row)
    if damaged:
        log.warning("%s", _told(path, damaged))
    return rows


def _lines(path: Path) -> Iterator[tuple[int, Row | None]]:
    """Number and row of each line, None if it is damaged; a last one cut short does not count."""
    if not path.exists():
        return
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        yield number, _row(line)
    if (row := _row(last)) is not None:
        yield len(lines) + 1, row


def _told(path: Path, damaged: Sequence[int]) -> str:
    """Which lines are left out."""
    more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
    return f"{path}: damaged lines, left out: {', '.join(map(str, damaged[:10]))}{more}"


def _row(line: bytes) -> Row | None:
    """The row of a line; None if it is damaged."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) else None
