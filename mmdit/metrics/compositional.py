"""Compositional accuracy: what is in a picture, read from its pixels, against what was asked.

No learned detector. Each pixel is explained as a mix of the background and one colour of the
palette; connected pixels of more object than background are one object, its colour by vote, its
shape the one whose drawing of the same area and centre of mass overlaps best.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmdit.data.captions import RELATIONS, Scene
from mmdit.data.drawing import COLOURS, Image, area_and_centroid, cover
from mmdit.data.shapes import Shapes

Array: TypeAlias = NDArray[np.floating[Any]]
Mask: TypeAlias = NDArray[np.bool_]

SHARE = 0.25  # of the leading colour's votes: with fewer, a colour is no object of its own


class Detection(NamedTuple):
    """One object seen; lengths in image sides, (x, y) its centre of mass, y down."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    area: float


def detect(
    image: Image,
    *,
    shapes: Sequence[str],
    colours: Sequence[str],
    background: str,
    least_area: float = 0.01,
) -> list[Detection]:
    """The objects in a picture (h, w, 3) uint8, by the names of a palette and of shapes.

    Specks below `least_area`, a fraction of the picture, are no objects.
    """
    coverage, error = _explain(image, colours, background)
    label = error.argmin(axis=-1)
    foreground = np.take_along_axis(coverage, label[..., None], axis=-1)[..., 0] > 0.5
    inner = foreground & _surrounded(label)
    found = []
    for blob in components(foreground):
        elected = _elect(label[blob & inner] if (blob & inner).any() else label[blob])
        owner = elected[error[..., elected].argmin(axis=-1)]
        for colour in elected:
            for part in components(blob & (owner == colour)):
                if part.mean() >= least_area:
                    # Two pixels around: the soft edge belongs to the object, its neighbours do not.
                    reach = _soften(_soften(part.astype(np.float32))) > 0
                    own = np.where(reach & (part | ~foreground), coverage[..., colour], 0)
                    found.append(_recognize(own, colours[colour], shapes))
    return found


def _surrounded(label: NDArray[np.intp]) -> Mask:
    """Pixels whose four neighbours have their label: not the edges, which can look like a third
    colour (half black on white is grey)."""
    padded = np.pad(label, 1, mode="edge")
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    same: Mask = np.logical_and.reduce([neighbour == label for neighbour in around])
    return same


def _elect(votes: NDArray[np.intp]) -> NDArray[np.intp]:
    """The colours of one blob: usually one, more where objects touch."""
    counts = np.bincount(votes)
    return np.flatnonzero(counts >= max(1.0, SHARE * counts.max()))


def _explain(image: Image, colours: Sequence[str], background: str) -> tuple[Array, Array]:
    """Each pixel as a mix of each colour and background: coverage, squared RGB error (h, w, k)."""
    ground = np.array(COLOURS[background], np.float32)
    directions = np.array([COLOURS[name] for name in colours], np.float32) - ground  # (k, 3)
    lengths = np.square(directions).sum(axis=-1)
    offsets = image.astype(np.float32) - ground
    coverage = (offsets @ directions.T / lengths).clip(0, 1)
    error = np.square(offsets[..., None, :] - coverage[..., None] * directions).sum(axis=-1)
    # Grey may be half black on white: of two explanations, prefer the pixel that is all object.
    return coverage, error + 0.05 * np.square(1 - coverage) * lengths


def components(mask: Mask) -> list[Mask]:
    """The 4-connected regions of a mask, by spreading the greatest label until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread = np.where(mask, np.maximum.reduce((labels, *around)), 0)
        # A label is the number of a pixel of the region: jump to the label found there.
        spread = np.append(0, spread)[spread]
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _soften(picture: Array) -> Array:
    """One pass of the binomial blur (1, 2, 1) / 4 along both axes."""
    padded = np.pad(picture, 1)
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4


def _recognize(coverage: Array, colour: str, shapes: Sequence[str]) -> Detection:
    """The shape whose drawing of the same area and centre of mass overlaps best.

    Drawings are tried sharp and blurred, or a blurred square would pass for a circle.
    """
    size = coverage.shape[0]
    centres = (np.arange(size) + 0.5) / size
    total = float(coverage.sum())
    x = float((coverage @ centres).sum() / total)
    y = float((centres @ coverage).sum() / total)
    area = total / size**2
    inside = [np.flatnonzero(coverage.any(axis=axis)) for axis in (1, 0)]
    crop = tuple(slice(max(0, where[0] - 3), where[-1] + 4) for where in inside)
    seen = coverage[crop]
    candidates = []
    for shape in shapes:
        unit_area, unit_x, unit_y = area_and_centroid(shape)
        radius = (area / unit_area) ** 0.5
        window = cover(shape, x - unit_x * radius, y - unit_y * radius, radius, size)
        template = np.zeros_like(coverage)
        template[window.rows, window.columns] = window.coverage
        template = template[crop]
        for _ in range(3):
            union = np.maximum(template, seen).sum()
            overlap = float(np.minimum(template, seen).sum() / union)
            candidates.append((overlap, Detection(shape, colour, x, y, radius, area)))
            template = _soften(template)
    return max(candidates)[1]


def matches(scene: Scene, found: Sequence[Detection]) -> bool:
    """Whether a picture shows what the short caption of `scene` asks for, and nothing else.

    Judged by the short caption whichever caption the picture was made from: sizes, places and
    colours that it does not name are free.

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
    """`matches` of each picture (n, h, w, 3) uint8 with its scene, by the palette of `data`.

    Anything of at least a quarter of the area of the smallest object of `data` is an object.
    """
    least_radius = min(least for least, _ in data.sizes.values())
    least_area = min(area_and_centroid(shape)[0] for shape in data.shapes) * least_radius**2 / 4
    return [
        matches(
            scene,
            detect(
                image.numpy(),
                shapes=data.shapes,
                colours=data.colours,
                background=scene.background,
                least_area=least_area,
            ),
        )
        for scene, image in zip(scenes, images, strict=True)
    ]
