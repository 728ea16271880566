"""How different the images of one prompt are: whether a model has kept more than one answer.

A caption leaves attributes free: "a circle" has any place and any colour. A model that has
forgotten all answers but one still has every image right. So diversity is measured beside
accuracy, as the entropy of the free attributes over the right images of one prompt, relative to
that of as many training scenes of the same caption.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
from einops import rearrange
from torch import Tensor

from mmdit.checks import whole_number
from mmdit.data.captions import COLOURED, Scene
from mmdit.data.drawing import Object, area_and_centroid
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.metrics.compositional import Detection, detections, matches

Things: TypeAlias = Sequence[Object] | Sequence[Detection]
LEAST = 8  # right images of a prompt, without which its entropies are not estimated
REFERENCES = 16  # groups of scenes whose mean entropy is the reference


class Diversity(NamedTuple):
    """Diversity relative to the data: 0 is one answer for each prompt, 1 as many as in the data.

    Attributes:
        place: of the cells of the layout that the objects are in; a mean over prompts. NaN if no
            prompt with enough right images leaves it free.
        colour: of the colours that a prompt does not name; likewise.
        left_out: number of prompts with fewer than 8 right images.
    """

    place: float
    colour: float
    left_out: int

    @property
    def mean(self) -> float:
        """The mean of place and colour, or the only one that is free."""
        free = [value for value in (self.place, self.colour) if not math.isnan(value)]
        return sum(free) / len(free) if free else math.nan


class CaptionDiversity:
    """Measures the diversity of images of some scenes' short captions, relative to training scenes.

    Example:
        measure = CaptionDiversity(data=data, scenes=scenes, members=24)
        measure(pipe([short_caption(scene) for scene in scenes], num_images=24)).mean

    Args:
        data: the shapes, of whose scenes the captions are.
        scenes: one for each prompt.
        members: number of images of each prompt, at least 8.

    Raises:
        UserError: too few images.
    """

    def __init__(self, *, data: Shapes, scenes: Sequence[Scene], members: int) -> None:
        self.data, self.scenes = data, list(scenes)
        self.members = whole_number("members", members, LEAST)

    def __call__(self, images: Tensor) -> Diversity:
        """The diversity of images, uint8 (len(scenes) * members, h, w, 3), prompts outermost.

        Raises:
            UserError: the number of images is another.
        """
        m = self.members
        if len(images) != len(self.scenes) * m:
            raise UserError(
                f"{len(images)} images are not {m} images for each of {len(self.scenes)} prompts"
            )
        shares: dict[str, list[float]] = {"place": [], "colour": []}
        left_out = 0
        for number, scene in enumerate(self.scenes):
            found = detections(self.data, [scene] * m, images[number * m : (number + 1) * m])
            right = [things for things in found if matches(scene, things)]
            if len(right) < LEAST:
                left_out += 1
                continue
            for name, attribute in attributes(scene, self.data.grid).items():
                drawn = [values[: len(right)] for values in self._drawn[number][name]]
                reference = sum(map(entropy, drawn)) / len(drawn)
                if reference > 0:  # "four circles" fill a layout of four cells: no place is free
                    shares[name].append(entropy(map(attribute, right)) / reference)
        means = {name: sum(each) / len(each) if each else math.nan for name, each in shares.items()}
        return Diversity(**means, left_out=left_out)

    @cached_property
    def _drawn(self) -> list[dict[str, list[list[Hashable]]]]:
        """For each prompt and attribute, its values in groups of training scenes.

        They are drawn once, since all models are compared with the same ones.
        """
        train = self.data.view("train")
        found = []
        for number, scene in enumerate(self.scenes):
            starts = range(number * REFERENCES, (number + 1) * REFERENCES)
            groups = [
                [train.scene_like(scene, start * self.members + i) for i in range(self.members)]
                for start in starts
            ]
            found.append(
                {
                    name: [[attribute(other.objects) for other in group] for group in groups]
                    for name, attribute in attributes(scene, train.grid).items()
                }
            )
        return found


def attributes(scene: Scene, grid: int) -> dict[str, Callable[[Things], Hashable]]:
    """The attributes that a short caption leaves free, as functions of the objects in an image."""
    found: dict[str, Callable[[Things], Hashable]] = {
        "place": lambda things: places(scene, things, grid)
    }
    if scene.task not in COLOURED:
        found["colour"] = colours
    return found


def places(scene: Scene, things: Things, grid: int) -> Hashable:
    """The cell of each object, with its shape and the colour that a caption names; sorted."""
    named = scene.task in COLOURED
    return tuple(sorted((t.shape, t.colour if named else "", *_cell(t, grid)) for t in things))


def colours(things: Things) -> Hashable:
    """The colour of each object, with its shape; sorted."""
    return tuple(sorted((thing.shape, thing.colour) for thing in things))


def _cell(thing: Object | Detection, grid: int) -> tuple[int, int]:
    """Column and row of the cell that the centre of an object is in."""
    x, y = thing.x, thing.y
    if isinstance(thing, Detection):  # its place is that of its centroid
        _, across, down = area_and_centroid(thing.shape)
        x, y = x - across * thing.radius, y - down * thing.radius
    return tuple(min(max(int(at * grid), 0), grid - 1) for at in (x, y))  # type: ignore[return-value]


def entropy(values: Iterable[Hashable]) -> float:
    """The entropy, in nats, of the distribution from which some values were drawn.

    The entropy of the observed frequencies is too low: of 24 draws from 30 equal values by 0.7
    nats. This estimator (Chao, Wang & Jost 2013, Methods in Ecology and Evolution 4, eq. 7) adds
    what values that were not seen contribute, by the numbers f1 and f2 of those seen once and
    twice; there it is off by less than 0.1. It is 0 if all values are the same.
    """
    seen = np.array(sorted(Counter(values).values()))
    n, f1, f2 = int(seen.sum()), int((seen == 1).sum()), int((seen == 2).sum())
    inverses = np.append(0, np.cumsum(1 / np.arange(1, max(n, 2))))  # harmonic numbers
    total = float((seen / n * (inverses[n - 1] - inverses[seen - 1])).sum())
    if f1 == 0 or n == 1:
        return total
    unseen = 2 * f2 / ((n - 1) * f1 + 2 * f2) if f2 else 2 / ((n - 1) * (f1 - 1) + 2)
    if unseen == 1:
        return total
    r = np.arange(1, n)
    tail = -math.log(unseen) - float(((1 - unseen) ** r / r).sum())
    return total + f1 / n * (1 - unseen) ** (1 - n) * tail


def pixel_deviation(images: Tensor, members: int) -> float:
    """The standard deviation of a pixel over the images of one prompt, from 0 to 127.5.

    It is the deviation of each value over the images of its prompt, then the mean over all values
    and prompts.

    Args:
        images: uint8 (prompts * members, h, w, 3), prompts outermost.
        members: number of images of each prompt.

    Raises:
        UserError: the images cannot be divided so.
    """
    if members < 1 or not len(images) or len(images) % members:
        raise UserError(f"{len(images)} images are not {members} images for each of some prompts")
    groups = rearrange(images, "(g m) h w c -> g m (h w c)", m=members).double()
    return groups.std(dim=1, correction=0).mean().item()
