"""Checks of constructor arguments: the message names field, value and expectation."""

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmdit.errors import NotFinite, UserError

COUNTS = 2**63 - 1  # torch counts in 64 bits, one of them for the sign
SEEDS = 2**64 - 1  # the last seed that torch and numpy's Philox take
MOST_STEPS = 10_000  # of a solver: far more than any sampling needs
SHOWN = {COUNTS: "2^63 - 1", SEEDS: "2^64 - 1"}


def whole_number(name: str, given: Any, least: int = 1, most: int = COUNTS) -> int:
    """A whole number of Python, numpy or torch, as an int; a bool is none.

    Raises:
        UserError: something else, or a number outside [least, most].
    """
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except (TypeError, ValueError):
        number = None
    if number is None or not least <= number <= most:
        bounds = f"from {least} to {SHOWN.get(most, f'{most:,}')}"
        if most == COUNTS and (number is None or number < least):
            bounds = f"of at least {least}"
        raise UserError(f"{name}={given} must be a whole number {bounds}")
    return number


def seed_number(name: str, given: Any, *, images: int = 1) -> int:
    """A seed, 0 to 2^64 - 1, from which so many images are counted: the last has seed + images - 1.

    Raises:
        UserError: it is none, or too large for them.
    """
    number = whole_number(name, given, 0, SEEDS)
    if number + images - 1 > SEEDS:
        raise UserError(
            f"{name}={given} must be a whole number from 0 to 2^64 - {images}: seeds of {images} "
            f"images are counted up from it, and the last of all is 2^64 - 1"
        )
    return number


def expect(holds: bool, field: str, value: object, expectation: str) -> None:
    """Raise UserError "`field` `value` `expectation`" unless it holds."""
    if not holds:
        raise UserError(f"{field} {value!r} {expectation}")


def expect_whole(field: str, value: Any, least: int) -> None:
    """Raise UserError unless `value` is a whole number of at least `least`; a bool is none."""
    holds = isinstance(value, int) and not isinstance(value, bool) and value >= least
    expect(holds, field, value, f"must be a whole number, at least {least}")
    expect(value <= COUNTS, field, value, "must be below 2^63")


def expect_number(field: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise UserError unless `value` is a finite number in [least, most]; a bool is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    expect(is_number and math.isfinite(value), field, value, "must be a number")
    if most < math.inf:
        expect(least <= value <= most, field, value, f"must be in [{least:g}, {most:g}]")
    expect(value >= least, field, value, f"must be at least {least:g}")


def expect_list(field: str, value: Any) -> None:
    """Raise UserError unless `value` is a list, and no text."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    expect(is_list, field, value, "must be a list")


def expect_mapping(field: str, value: Any) -> None:
    """Raise UserError unless `value` gives something to names."""
    expect(isinstance(value, Mapping), field, value, "must give a value to each name")


def at_least_one(owner: str, **counts: int) -> None:
    """Raise UserError, naming the owner and the first of its counts that is below 1, if any is."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{owner}: {name} {count} must be at least 1")


def one_of(field: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError, with the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{field} {name!r} must be one of {', '.join(known)}{hint}")


def expect_finite(stage: str, x: Tensor) -> None:
    """Raise NotFinite, naming the stage that x comes from, if a value of it is NaN or infinite."""
    if x.is_meta or isinstance(x, FakeTensor):  # which have no values
        return
    finite = x.isfinite().flatten(1).all(dim=1)  # of each sample (b, ...)
    if not finite.all():
        bad = (~finite).sum().item()
        raise NotFinite(
            f"{stage} gave NaN or infinite values for {bad} of {len(x)} samples. Try bfloat16 or "
            "float32 instead of float16 (dtype=torch.bfloat16, or precision=bf16 or fp32 on a "
            "command line), or look for damaged weights with verify=true"
        )
