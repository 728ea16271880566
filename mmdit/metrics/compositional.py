"""Compositional accuracy: what is in a picture, read from its pixels, against what was asked.

No learned detector: the picture is segmented by distance from the background, each connected
component is one object, its colour is the palette's nearest to its inner pixels, its shape the one
whose drawing at the same place and area overlaps best.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmdit.data.captions import RELATIONS, Scene
from mmdit.data.drawing import COLOURS, Image, area_and_centroid, cover
from mmdit.data.shapes import Shapes

FOREGROUND = 80.0  # least RGB distance from the background, of 442
LEAST_AREA = 1 / 100  # of the picture: smaller specks are no objects


class Detection(NamedTuple):
    """One object seen; lengths in image sides, (x, y) its centre of mass, y down."""

    shape: str
    colour: str
    x: float
    y: float
    area: float


def detect(
    image: Image, *, shapes: Sequence[str], colours: Sequence[str], background: str
) -> list[Detection]:
    """The objects in a picture (h, w, 3) uint8, by the names of a palette and of shapes."""
    pixels = image.astype(np.float32)
    ground = np.float32(COLOURS[background])
    strength = np.linalg.norm(pixels - ground, axis=-1)
    found = []
    for mask in components(strength > FOREGROUND):
        if mask.mean() < LEAST_AREA:
            continue
        # Edge pixels mix with the background: the stronger half tells the colour.
        inner = mask & (strength >= np.median(strength[mask]))
        colour = np.median(pixels[inner], axis=0)
        name = min(colours, key=lambda c: float(np.linalg.norm(colour - np.float32(COLOURS[c]))))
        full = float(np.linalg.norm(np.float32(COLOURS[name]) - ground))
        coverage = np.where(mask, (strength / full).clip(0, 1), 0.0)
        found.append(_recognize(coverage, name, shapes))
    return found


def components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 4-connected regions of a mask, by spreading the greatest label until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread = np.where(mask, np.maximum.reduce((labels, *around)), 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _recognize(coverage: NDArray[np.float64], colour: str, shapes: Sequence[str]) -> Detection:
    """The shape whose drawing of the same area and centre of mass overlaps best."""
    size = coverage.shape[0]
    centres = (np.arange(size) + 0.5) / size
    total = float(coverage.sum())
    x = float((coverage @ centres).sum() / total)
    y = float((centres @ coverage).sum() / total)
    area = total / size**2

    def overlap(shape: str) -> float:
        unit_area, unit_x, unit_y = area_and_centroid(shape)
        radius = (area / unit_area) ** 0.5
        window = cover(shape, x - unit_x * radius, y - unit_y * radius, radius, size)
        template = np.zeros_like(coverage)
        template[window.rows, window.columns] = window.coverage
        return float(np.minimum(template, coverage).sum() / np.maximum(template, coverage).sum())

    return Detection(max(shapes, key=overlap), colour, x, y, area)


def matches(scene: Scene, found: Sequence[Detection]) -> bool:
    """Whether a picture shows what the short caption of `scene` asks for, and nothing else.

    The number of objects is exact. Shapes are always asked for; colours in the tasks colours,
    position and colour attribution; the place of the first object from the second in position,
    where the offset along the relation's axis must have its sign and be the larger one.
    """
    coloured = scene.task in ("colours", "position", "colour_attribution")

    def kinds(things: Iterable[object]) -> list[tuple[str, str]]:
        return sorted((t.shape, t.colour if coloured else "") for t in things)  # type: ignore[attr-defined]

    if kinds(scene.objects) != kinds(found):
        return False
    if scene.relation is None:
        return True
    wanted = (scene.objects[0].shape, scene.objects[0].colour)
    first, second = sorted(found, key=lambda d: (d.shape, d.colour) != wanted)
    x, y = first.x - second.x, first.y - second.y
    along_x, along_y = RELATIONS[scene.relation]
    along, across = (x * along_x, y) if along_x else (y * along_y, x)
    return along > abs(across)


def judge(data: Shapes, scenes: Sequence[Scene], images: Tensor) -> list[bool]:
    """`matches` of each picture (n, h, w, 3) uint8 with its scene, by the palette of `data`."""
    return [
        matches(
            scene,
            detect(
                image.numpy(),
                shapes=data.shapes,
                colours=data.colours,
                background=scene.background,
            ),
        )
        for scene, image in zip(scenes, images, strict=True)
    ]
