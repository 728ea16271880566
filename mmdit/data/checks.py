"""Checks of constructor arguments: the message names field, value and expectation."""

import difflib
from collections.abc import Iterable

from mmdit.errors import UserError


def expect(holds: bool, field: str, value: object, expectation: str) -> None:
    """Raise UserError "`field` `value` `expectation`" unless it holds."""
    if not holds:
        raise UserError(f"{field} {value!r} {expectation}")


def one_of(field: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError, with the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{field} {name!r} must be one of {', '.join(known)}{hint}")
