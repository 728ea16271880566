"""Runs that a comparison reads: a config, and figures over steps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_run(
    folder: Path, name: str, rows: Mapping[int, Mapping[str, float | None]], **config: Any
) -> Path:
    """A run of 100 steps that logged `rows`: step -> metric -> value."""
    run = folder / name
    run.mkdir(parents=True)
    facts = {
        "seed": 0,
        "initial": "/weights",
        "initial_sha256": "ab",
        "training": {"steps": 100, "batch_size": 4},
        "variant": None,
        **config,
    }
    (run / "config.json").write_text(json.dumps(facts))
    lines = [{"step": 10, "loss": 0.5}]
    lines += [{"step": step, **row} for step, row in rows.items()]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return run
