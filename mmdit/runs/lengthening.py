"""Resuming a run for more steps than its learning-rate schedule was made for.

A schedule that ends is tied to a length. But until `warmup_stable_decay` begins its decay, runs of
all lengths are the same, so a run can be resumed from there with a longer schedule.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit.runs.checkpoint import Checkpoint

LENGTH = ("schedule.steps", "schedule.decay_steps", "schedule.final")


def before_its_end(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> tuple[str, ...]:
    """Config keys that may differ because neither schedule has begun its decay at `step`."""
    starts = (_stable_steps(before), _stable_steps(now))
    return LENGTH if all(start is not None and step <= start for start in starts) else ()


def _stable_steps(config: Mapping[str, Any]) -> int | None:
    """Number of steps before a schedule's decay; None if it has no such phase."""
    schedule = config.get("schedule") or {}
    try:
        return int(schedule["steps"]) - int(schedule["decay_steps"])
    except (KeyError, TypeError, ValueError):
        return None


def how_to_lengthen(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    run: Path,
    checkpoints: Sequence[Checkpoint],
) -> str:
    """Advice for an error message if the length of the schedule has changed; otherwise ''."""
    was, is_ = before.get("schedule") or {}, now.get("schedule") or {}
    if not was.get("steps") or was.get("steps") == is_.get("steps"):
        return ""
    advice = f". A schedule that ends is made for its length, schedule.steps={was['steps']}: "
    start = _stable_steps(before)
    if start is not None:
        earlier = [c for c in checkpoints if c.step <= start]
        advice += (
            f"this one can be lengthened from a checkpoint before its decay, at step {start}; "
        )
        if not earlier:
            return advice + "none is kept (training.keep_every=... keeps some)"
        later = [c.folder.name for c in checkpoints if c.step > start]
        copy = run.with_name(f"{run.name}-longer")
        paths = " ".join(shlex.quote(str(copy / "checkpoints" / name)) for name in later)
        return advice + (
            f"the last is that of step {earlier[-1].step}. Copy the run and remove the later ones, "
            f"cp -r {shlex.quote(str(run))} {shlex.quote(str(copy))} && rm -r {paths}, then give "
            f"the command with resume={copy}"
        )
    if was.get("final"):
        advice += (
            f"add schedule.steps={was['steps']} to go on at its final rate, {was['final']} x lr"
        )
        return f"{advice}; or train anew for the whole length"
    return advice + (
        "train anew for the whole length. Runs that are to be lengthened need "
        "schedule=warmup_constant, or schedule=warmup_stable_decay and a checkpoint before "
        "its decay"
    )
