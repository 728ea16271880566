"""Reversible tables: how the tensors of a public format correspond to ours.

A format is a list of rules. Each rewrites a part of our key (`re.sub`); all of them in turn give
the key in the public file ("theirs"). Some also say that our tensor is a part of theirs, or theirs
in another shape. Applied to a model, the rules give the correspondence of every tensor, and both
directions follow from it: loading reads it from right to left, saving from left to right.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Form(NamedTuple):
    """How one of our tensors is contained in one of theirs.

    Attributes:
        shape: from our shape to theirs.
        read: from their tensor and our shape to our tensor, a view where possible.
        write: the inverse, from all of our tensors that share one of theirs, in the model's order,
            and their shape to their tensor.
    """

    shape: Callable[[Shape], Shape]
    read: Callable[[Tensor, Shape], Tensor]
    write: Callable[[Sequence[Tensor], Shape], Tensor]


SAME = Form(lambda ours: ours, lambda theirs, _: theirs, lambda ours, _: ours[0])


def reshaped(shape: Callable[[Shape], Shape]) -> Form:
    """The form of the same values in another shape."""
    return Form(shape, lambda theirs, ours: theirs.reshape(ours), lambda t, s: t[0].reshape(s))


def rows(i: int, n: int) -> Form:
    """The form of the i-th of n equal groups of rows."""
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
    """One rewriting of our keys, and the form of the tensors whose keys it rewrites.

    Attributes:
        ours: regular expression, searched for in our key.
        theirs: its replacement (see `re.sub`).
        form: how the tensor is contained in theirs; None leaves it as it is.
    """

    ours: str
    theirs: str | Callable[[re.Match[str]], str]
    form: Form | None = None


class Slot(NamedTuple):
    """One of their tensors, and those of ours that it consists of: (key, shape, form)."""

    shape: Shape
    parts: list[tuple[str, Shape, Form]]

    def read(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensors by key, from theirs."""
        return {key: form.read(theirs, shape) for key, shape, form in self.parts}

    def write(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor, from ours."""
        form = self.parts[0][2]
        return form.write([ours[key] for key, _, _ in self.parts], self.shape)


def correspondence(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Slot]:
    """What each of their keys holds, for a model with these tensors (which may be on meta)."""
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
