"""Combinations held out of training: kinds of objects, and pairs of kinds."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Kind(NamedTuple):
    """The colour and shape of an object, regardless of its size and place."""

    colour: str
    shape: str


class Composition(NamedTuple):
    """Kinds shown in training, kinds never shown, and pairs of shown kinds never shown together.

    These are lists, so that draws from them do not depend on string hashing.
    """

    kinds: list[Kind]
    held_out_kinds: list[Kind]
    held_out_pairs: list[tuple[Kind, Kind]]

    def pairs(self, *, different_shapes: bool) -> list[tuple[Kind, Kind]]:
        """The pairs of different kinds that training may show together."""
        held_out = set(self.held_out_pairs)
        pairs = itertools.combinations(self.kinds, 2)
        return [
            (a, b)
            for a, b in pairs
            if (a, b) not in held_out and not (different_shapes and a.shape == b.shape)
        ]


def hold_out(
    rng: np.random.Generator, colours: Sequence[str], shapes: Sequence[str], fraction: float
) -> Composition:
    """Hold out about `fraction` of the kinds, then of the pairs of the remaining kinds.

    Every colour and every shape stays in some remaining kind. Only pairs of different shapes are
    held out, since these can pose every task of two objects. A fraction above 0 holds out at least
    one kind and one pair.
    """
    kinds = [Kind(*names) for names in itertools.product(colours, shapes)]
    wanted = _share(fraction, len(kinds))
    held_out: list[Kind] = []
    for kind in _shuffled(rng, kinds):
        left = [other for other in kinds if other not in held_out and other != kind]
        still_seen = {name for other in left for name in other} >= set(kind)
        if still_seen and len(held_out) < wanted:
            held_out.append(kind)
    shown = Composition([kind for kind in kinds if kind not in held_out], held_out, [])
    pairs = shown.pairs(different_shapes=True)
    return shown._replace(held_out_pairs=_shuffled(rng, pairs)[: _share(fraction, len(pairs))])


def _share(fraction: float, count: int) -> int:
    return max(1, round(fraction * count)) if fraction else 0


def _shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    keys = rng.random(len(items))
    return [items[position] for position in np.argsort(keys)]
