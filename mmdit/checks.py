"""Checks of what users give: the message names field, value and expectation, always alike.

A field is called as it was written: `steps` of a function, `training.steps` of a config. Checks of
numbers return the number.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmdit.errors import NotFinite, UserError

COUNTS = 2**63 - 1  # torch counts in 64 bits, one of them for the sign
SEEDS = 2**64 - 1  # the last seed that torch and numpy's Philox take
MOST_STEPS = 10_000  # of a solver: far more than any sampling needs
SHOWN = {COUNTS: "2^63 - 1", SEEDS: "2^64 - 1"}


def expect(holds: bool, field: str, value: object, expectation: str) -> None:
    """Raise UserError "field=value expectation" unless it holds.

    Example:
        >>> expect(len(betas) == 2, "optimizer.betas", betas, "must be two numbers")
    """
    if not holds:
        raise UserError(f"{field}={value!r} {expectation}")


def whole_number(field: str, value: Any, least: int = 1, most: int = COUNTS) -> int:
    """A whole number of Python, numpy or torch, as an int; a bool is not one.

    Raises:
        UserError: something else, or a number outside [least, most].
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not least <= number <= most:
        bounds = f"from {least} to {SHOWN.get(most, f'{most:,}')}"
        if most == COUNTS and (number is None or number < least):
            bounds = f"of at least {least}"
        raise UserError(f"{field}={value!r} must be a whole number {bounds}")
    return number


def seed_number(field: str, value: Any, *, images: int = 1) -> int:
    """A seed, 0 to 2^64 - 1, from which so many images are counted: the last has seed + images - 1.

    Raises:
        UserError: it is not one, or too large for them.
    """
    number = whole_number(field, value, 0, SEEDS)
    if number + images - 1 > SEEDS:
        raise UserError(
            f"{field}={value} must be a whole number from 0 to 2^64 - {images}: seeds of {images} "
            f"images are counted up from it, and the last of all is 2^64 - 1"
        )
    return number


def at_least_one(owner: str, **counts: Any) -> None:
    """Raise UserError, naming the owner, unless each is a whole number of at least 1."""
    for name, count in counts.items():
        whole_number(f"{owner}: {name}", count)


def number(
    field: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """A finite number of Python or numpy, as a float; a bool is not one.

    Raises:
        UserError: something else, or a number outside [least, most] or (above, below).
    """
    is_one = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_one or not (least <= value <= most and above < value < below):
        bounds = {"above": above, "of at least": least, "below": below, "at most": most}
        stated = [f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound)]
        limits = " and ".join(stated)
        raise UserError(f"{field}={value!r} must be a finite number {limits}".rstrip())
    return float(value)


def flag(field: str, value: Any) -> None:
    """Raise UserError unless `value` is a bool."""
    expect(isinstance(value, bool), field, value, "must be true or false")


def text(field: str, value: Any) -> None:
    """Raise UserError unless `value` is a text."""
    expect(isinstance(value, str), field, value, "must be a text")


def listed(field: str, value: Any) -> None:
    """Raise UserError unless `value` is a list, and not a text."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    expect(is_list, field, value, "must be a list")


def mapping(field: str, value: Any) -> None:
    """Raise UserError unless `value` gives something to names."""
    expect(isinstance(value, Mapping), field, value, "must give a value to each name")


def one_of(field: str, value: Any, known: Iterable[str]) -> None:
    """Raise UserError, with the nearest known name, unless `value` is known."""
    known = list(known)
    hint = did_you_mean(nearest(str(value), known))
    expect(value in known, field, value, f"must be one of {', '.join(known)}{hint and f'.{hint}'}")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name in `known` most like `word`, as a whole or in its last part; None if none is."""
    if len(word) > 200:  # no slip of a name, and comparing takes the square of its length
        return None

    def likeness(name: str) -> tuple[float, float]:
        last, last_known = re.split(r"[./]", word)[-1], re.split(r"[./]", name)[-1]
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        return max(whole, 0.9 * difflib.SequenceMatcher(None, last, last_known).ratio()), whole

    best = max(sorted(known), key=likeness, default="")
    return best if best and likeness(best)[0] > 0.65 else None


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` at its beginning replaced by the home folder.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        home = Path(path).parts[0]
        raise UserError(
            f"{path}: {home} has no home folder here: write the whole path, or ./{home} for a "
            "folder of this name"
        ) from error


def did_you_mean(name: str | None) -> str:
    """The question to put behind a message, if there is a name to offer."""
    return f" Did you mean {name}?" if name else ""


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
