"""Reads scores for the ranking: the `scores.json` files of run folders, or a table of scores."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.errors import UserError, first_line
from mmdit.runs.checkpoint import runs_in
from mmdit.study.protocol import PROTOCOL as SCORES_PROTOCOL
from mmdit.study.protocol import SETTINGS as SAMPLERS
from mmdit.study.protocol import SOLVER
from mmdit.study.ranking import Point, Run


class Setting(NamedTuple):
    """A sampler setting and the weights that it is used with, or the name of a table's setting."""

    weights: str
    steps: int | None
    guidance: float | None
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"{self.weights}, {self.steps} steps, guidance {self.guidance:g}"


SETTINGS = [Setting(weights, *sampler) for weights in ("ema", "raw") for sampler in SAMPLERS]


def read_runs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the `scores.json` of each run folder.

    Returns:
        The records, and notes on omissions and differences.

    Raises:
        UserError: there is no such folder, there are no scores in it, or a file is invalid.
    """
    if not folder.is_dir():
        raise UserError(f"runs={folder}: there is no such folder")
    runs = runs_in(folder)
    files = [run / "scores.json" for run in runs if (run / "scores.json").is_file()]
    if not files:
        raise UserError(f"runs={folder}: no folder in it has a scores.json")
    records = [
        {
            **read_scores(file),
            "run": file.parent.relative_to(folder).as_posix(),
            "folder": file.parent,
        }
        for file in files
    ]
    notes = []
    scored = {file.parent for file in files}
    unscored = [run.relative_to(folder).as_posix() for run in runs if run not in scored]
    if unscored:
        notes.append(f"Ignored, without scores.json: {', '.join(unscored)}.")
    others = sum(setting_of(row) not in SETTINGS for r in records for row in r["scores"])
    if others:
        notes.append(f"Ignored, in other settings than the protocol's: {others} scores.")
    for record in records:
        losses = [record["validation"][weights]["loss"] for weights in ("ema", "raw")]
        if None in map(finite, losses):
            notes.append(f"DIVERGED, the validation loss is not finite: {as_run(record)}.")
        if skipped := record["training"].get("skipped_steps"):
            steps = record["training"]["steps"]
            notes.append(f"{skipped} of {steps} steps skipped, not finite: {as_run(record)}.")
    for key in ("steps", "batch_size"):
        values = sorted({record["training"][key] for record in records})
        if len(values) > 1:
            notes.append(f"Training differs between the runs: {key} {', '.join(map(str, values))}.")
    return records, notes


FIELDS: dict[str, type] = {
    "protocol": str,
    "variant": str,
    "seed": int,
    "dataset": str,
    "samples": int,
    "weights_sha256": dict,
    "training": dict,
    "validation": dict,
    "scores": list,
}
TRAINING_FIELDS = ("steps", "batch_size", "parameters", "flops")
SCORE_FIELDS = ("weights", "steps", "guidance", "solver", "clip", "fd")


def read_scores(file: Path) -> dict[str, Any]:
    """Read and validate one `scores.json`.

    Raises:
        UserError: it is not JSON, lacks a field, has another protocol, or has a duplicate setting.
    """
    record = read_json(file)
    if not isinstance(record, dict):
        raise UserError(f"{file} must hold a JSON object")
    if record.get("protocol") != SCORES_PROTOCOL:
        found = record.get("protocol")
        raise UserError(f"{file}: protocol {found!r} must be {SCORES_PROTOCOL!r}")
    for name, kind in FIELDS.items():
        if not isinstance(record.get(name), kind) or isinstance(record.get(name), bool):
            raise UserError(
                f"{file}: {name} is {record.get(name)!r}, but must be of type {kind.__name__}"
            )
    need(file, "training", record["training"], TRAINING_FIELDS)
    for name in TRAINING_FIELDS:
        value = record["training"][name]
        if not is_number(value) or not 0 < value < math.inf:
            raise UserError(f"{file}: training.{name} is {value!r}, which is not a positive number")
    for weights in ("ema", "raw"):
        need(file, f"validation.{weights}", record["validation"].get(weights), ("loss", "levels"))
    seen = set()
    for i, row in enumerate(record["scores"]):
        need(file, f"scores[{i}]", row, SCORE_FIELDS)
        if not is_number(row["guidance"]) or not isinstance(row["steps"], int):
            raise UserError(f"{file}: scores[{i}] needs numbers for steps and guidance")
        if not isinstance(row["weights"], str) or not isinstance(row["solver"], str):
            raise UserError(f"{file}: scores[{i}] needs names for weights and solver")
        key = tuple(row[name] for name in SCORE_FIELDS[:4])
        if key in seen:
            raise UserError(f"{file}: scores[{i}] repeats a setting: {key}")
        seen.add(key)
    return record


def need(file: Path, where: str, value: Any, names: Sequence[str]) -> None:
    """Raise UserError unless `value` is an object with these fields."""
    missing = [n for n in names if n not in value] if isinstance(value, dict) else list(names)
    if missing:
        raise UserError(f"{file}: {where} has no {', '.join(missing)}")


def as_run(record: Mapping[str, Any]) -> Run:
    """A record as a run to rank, with its scores in the protocol's settings."""
    points = {
        setting: point(row) for row in record["scores"] if (setting := setting_of(row)) in SETTINGS
    }
    facts = {name: record[name] for name in ("variant", "seed", "dataset", "samples")}
    # Scores are comparable only with the same number of references and the same noise.
    further = [f"{name} {record[name]}" for name in ("references", "noise_seed") if name in record]
    protocol = ", ".join([record["protocol"], *further])
    return Run(**facts, protocol=protocol, points=points)


def setting_of(row: Mapping[str, Any]) -> Setting | None:
    """The setting of a row of scores; None if its solver is not the protocol's."""
    setting = Setting(row["weights"], row["steps"], float(row["guidance"]))
    return setting if row["solver"] == SOLVER else None


def read_table(file: Path) -> tuple[list[Run], list[Setting]]:
    """Read a table of rows {variant, setting, clip, fd}, optionally with steps and guidance.

    Returns:
        One run per variant, and all settings.

    Raises:
        UserError: it is not a list of such rows, or a variant has a setting twice.
    """
    rows = read_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file} must hold a JSON list of rows")
    by_variant: dict[str, dict[Setting, Point]] = {}
    for i, row in enumerate(rows):
        need(file, f"row {i}", row, ("variant", "setting", "clip", "fd"))
        sampler = (row.get("steps"), row.get("guidance"))
        if not all(value is None or is_number(value) for value in sampler):
            raise UserError(f"{file}: steps and guidance of row {i} must be numbers or absent")
        points = by_variant.setdefault(str(row["variant"]), {})
        setting = Setting("", *sampler, str(row["setting"]))
        if setting in points:
            raise UserError(f"{file}: row {i} repeats {row['variant']}, {setting}")
        points[setting] = point(row)
    settings = list(dict.fromkeys(s for points in by_variant.values() for s in points))
    runs = [Run(v, 0, "", "table", None, points) for v, points in by_variant.items()]
    return runs, settings


def point(row: Mapping[str, Any]) -> Point:
    """The two scores of a row; non-numbers become NaN, which the ranking rejects."""
    return Point(*(float(row[n]) if is_number(row[n]) else math.nan for n in ("clip", "fd")))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; `true` is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: Any) -> float | None:
    """A metric; None if it is absent or not finite."""
    return float(value) if is_number(value) and math.isfinite(value) else None


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable JSON file: {first_line(error)}") from error
