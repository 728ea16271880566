"""Where figures go: always to `metrics.jsonl` and a plot, and to W&B if asked."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from mmdit.checkpoints.native import write_atomically
from mmdit.engine.files import unused, writing

log = logging.getLogger(__name__)
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

    On resume, lines of steps that will be made again are dropped. A file with damaged lines is
    kept as `metrics.jsonl.damaged`.

    Raises:
        UserError: here and in `log`, the disk is full or the folder cannot be written to.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.path = path
        rows, damaged = _read(path)
        self.rows = [row for row in rows if row["step"] <= start_step]
        kept = "".join(json.dumps(row) + "\n" for row in self.rows)
        with writing(path, path.parent):
            if damaged:
                copy = unused(path.with_name(f"{path.name}.damaged"))
                shutil.copyfile(path, copy)
                log.warning(
                    "%s: lines that are damaged, and left out: %d; the file as it was is kept as "
                    "%s",
                    *(path, damaged, copy.name),
                )
            write_atomically(path, kept.encode())
            self._file = path.open("a")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line."""
        row: Row = {"step": step, **finite(figures)}
        self.rows.append(row)
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
    rows, damaged = _read(path)
    if damaged:
        log.warning("%s: lines that are damaged, and left out: %d", path, damaged)
    return rows


def _read(path: Path) -> tuple[list[Row], int]:
    """Rows, and how many lines are damaged, not counting a last one without its end."""
    if not path.exists():
        return [], 0
    *lines, last = path.read_bytes().split(b"\n")
    found = [_row(line) for line in lines]
    rows = [row for row in [*found, _row(last)] if row is not None]
    return rows, found.count(None)


def _row(line: bytes) -> Row | None:
    """The row of a line; None if it is damaged."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) else None
