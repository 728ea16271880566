"""Reversible tables: how the tensors of a public format correspond to ours.

A format is a list of rules. Each rewrites part of our key (`re.sub`), all rules in turn, which
gives their key; some say besides that ours is a part of their tensor, or their tensor seen in
another shape. Applied to a model, the rules list the correspondence of every tensor, and both
directions follow from this one list: loading reads it from right to left, saving from left to
right.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Form(NamedTuple):
    """How one tensor of ours sits in one of theirs.

    `read(theirs)` gives a view where it can; `write` is its inverse, over all of ours that share
    a tensor of theirs, in the order of the model.
    """

    shape: Callable[[Shape], Shape]  # of theirs, from that of ours
    read: Callable[[Tensor, Shape], Tensor]  # their tensor, shape of ours
    write: Callable[[Sequence[Tensor], Shape], Tensor]  # ours, shape of theirs


SAME = Form(lambda ours: ours, lambda theirs, _: theirs, lambda ours, _: ours[0])


def reshaped(shape: Callable[[Shape], Shape]) -> Form:
    """The same numbers in another shape."""
    return Form(shape, lambda theirs, ours: theirs.reshape(ours), lambda t, s: t[0].reshape(s))


def rows(i: int, n: int) -> Form:
    """Ours is the i-th of n equal stacks of their rows."""
    return Form(
        lambda ours: (n * ours[0], *ours[1:]),
        lambda theirs, _: theirs.chunk(n)[i],
        lambda ours, _: torch.cat(list(ours)),
    )


# diffusers stores (scale, shift) where the original layout and we store (shift, scale).
SWAPPED = Form(
    lambda ours: ours,
    lambda theirs, _: torch.cat(theirs.chunk(2)[::-1]),
    lambda ours, _: torch.cat(ours[0].chunk(2)[::-1]),
)


class Rule(NamedTuple):
    """One rewriting of our keys, and the form of the tensors whose keys it rewrites."""

    ours: str  # regular expression
    theirs: str | Callable[[re.Match[str]], str]
    form: Form | None = None


class Slot(NamedTuple):
    """A tensor of theirs, and the tensors of ours that make it up."""

    shape: Shape
    parts: list[tuple[str, Shape, Form]]

    def read(self, theirs: Tensor) -> dict[str, Tensor]:
        return {key: form.read(theirs, shape) for key, shape, form in self.parts}

    def write(self, ours: Mapping[str, Tensor]) -> Tensor:
        form = self.parts[0][2]
        return form.write([ours[key] for key, _, _ in self.parts], self.shape)


def correspondence(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Slot]:
    """Their keys, and what each holds, for a model with these tensors (which may be on meta)."""
    slots: dict[str, Slot] = {}
    for key, tensor in tensors.items():
        theirs, form = key, SAME
        for rule in rules:
            theirs, hits = re.subn(rule.ours, rule.theirs, theirs)
            if hits and rule.form is not None:
                form = rule.form
        shape = tuple(tensor.shape)
        slot = slots.setdefault(theirs, Slot(form.shape(shape), []))
        slot.parts.append((key, shape, form))
    return slots
