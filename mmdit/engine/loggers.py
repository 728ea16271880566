"""Where figures go: always to `metrics.jsonl` and a plot, and to W&B if asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mmdit.checkpoints.native import write_atomically


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
    """`metrics.jsonl`: one JSON object a line, each with its step.

    On resume, lines of steps that will be made again are dropped.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["step"] <= start_step]
        kept = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(path, kept.encode())
        self._file = path.open("a")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line."""
        row = {"step": step, **figures}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing is logged after this."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
