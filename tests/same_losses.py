"""Compare what two runs logged, to prove a refactor: `python tests/same_losses.py one other`.

All records of both `metrics.jsonl` must be equal, but for how long steps took and the memory they
needed. Prints the first difference and exits with 1 if there is one.
"""

import json
import sys
from pathlib import Path
from typing import Any

MEASURED = {"images_per_second", "tokens_per_second", "tflops", "mfu", "data_wait", "memory_gb"}


def records(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without what differs from one machine and minute to the next."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str | None:
    """The first record that differs, if any."""
    for i, (left, right) in enumerate(zip(one, other, strict=False), 1):
        for key in left | right:
            if left.get(key) != right.get(key):
                return f"record {i}, {key}: {left.get(key)} and {right.get(key)}"
    return None if len(one) == len(other) else f"{len(one)} records and {len(other)}"


if __name__ == "__main__":
    one, other = (records(Path(run)) for run in sys.argv[1:3])
    found = difference(one, other)
    print(found or f"{len(one)} records are equal")
    sys.exit(found is not None)
