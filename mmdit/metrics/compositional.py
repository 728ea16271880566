"""Compositional accuracy: compares the objects detected in an image with those in its prompt.

The detector is not learned. Each pixel is explained as a mix of the background and one colour of
the palette. A connected region of mostly object pixels is one object; its colour is the majority of
its pixels', its shape the one whose drawing of equal area and centroid overlaps it best.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmdit.data.captions import COLOURED, RELATIONS, Scene
from mmdit.data.drawing import COLOURS, TEXTURES, Image, Object, area_and_centroid, cover
from mmdit.data.shapes import Shapes

Array: TypeAlias = NDArray[np.floating[Any]]
Mask: TypeAlias = NDArray[np.bool_]

SHARE = 0.25  # of the leading colour's votes: a colour with fewer is not a separate object


class Detection(NamedTuple):
    """A detected object; lengths as fractions of the image side, (x, y) its centroid, y down."""

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
    """Detect the objects in an image (h, w, 3) uint8, given the possible shapes and colours.

    Regions below `least_area`, a fraction of the image, are ignored. A region in both colours of a
    texture has that texture.
    """
    palette = palette_of(colours)
    coverage, error = _explain(image, palette, background)
    label = error.argmin(axis=-1)
    foreground = np.take_along_axis(coverage, label[..., None], axis=-1)[..., 0] > 0.5
    inner = foreground & _surrounded(label)
    found = []
    for blob in components(foreground):
        elected = _elect(label[blob & inner] if (blob & inner).any() else label[blob])
        elected = np.union1d(elected, _elect_textures(label[blob], palette, colours))
        owner = elected[error[..., elected].argmin(axis=-1)]
        for name, members in fills(elected, palette, colours):
            for part in components(blob & np.isin(owner, members)):
                if part.mean() >= least_area:
                    # Two pixels wider: include the soft edge, but not neighbouring objects.
                    reach = _soften(_soften(part.astype(np.float32))) > 0
                    covered = coverage[..., members].max(axis=-1)
                    own = np.where(reach & (part | ~foreground), covered, 0)
                    found.append(_recognize(own, name, shapes))
    return found


def palette_of(colours: Sequence[str]) -> list[str]:
    """The colours among some colours and textures, and those that the textures consist of."""
    parts = (part for name in colours for part in TEXTURES.get(name, (name,)))
    return list(dict.fromkeys(parts))


def fills(
    elected: NDArray[np.intp], palette: Sequence[str], colours: Sequence[str]
) -> list[tuple[str, list[int]]]:
    """What a region consists of: textures whose colours are both there, and the other colours.

    Args:
        elected: indices in `palette` of the colours of a region.
        palette: of `palette_of`.
        colours: the possible colours and textures.

    Returns:
        Names, with the indices of their colours.
    """
    left, found = elected.tolist(), []
    for name in colours:
        parts = [palette.index(part) for part in TEXTURES.get(name, ())]
        if parts and set(parts) <= set(left):
            found.append((name, parts))
            left = [index for index in left if index not in parts]
    return found + [(palette[index], [index]) for index in left]


def _surrounded(label: NDArray[np.intp]) -> Mask:
    """Pixels whose four neighbours have the same label.

    Edges are excluded because they can look like a third colour (half black on white is grey).
    """
    padded = np.pad(label, 1, mode="edge")
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    same: Mask = np.logical_and.reduce([neighbour == label for neighbour in around])
    return same


def _elect(votes: NDArray[np.intp]) -> NDArray[np.intp]:
    """The colours of a region: usually one, more if objects touch."""
    counts = np.bincount(votes)
    return np.flatnonzero(counts >= max(1.0, SHARE * counts.max()))


def _elect_textures(
    votes: NDArray[np.intp], palette: Sequence[str], colours: Sequence[str]
) -> NDArray[np.intp]:
    """The colours of the textures in a region: bars are too thin to have pixels inside."""
    counts = np.bincount(votes, minlength=len(palette))
    textures = ([palette.index(c) for c in TEXTURES[name]] for name in colours if name in TEXTURES)
    there = [parts for parts in textures if counts[parts].min() >= SHARE * counts.max()]
    return np.array(there, np.intp).flatten()


def _explain(image: Image, colours: Sequence[str], background: str) -> tuple[Array, Array]:
    """Each pixel as a mix of each colour and background: coverage, squared RGB error (h, w, k)."""
    ground = np.array(COLOURS[background], np.float32)
    directions = np.array([COLOURS[name] for name in colours], np.float32) - ground  # (k, 3)
    lengths = np.square(directions).sum(axis=-1)
    offsets = image.astype(np.float32) - ground
    coverage = (offsets @ directions.T / lengths).clip(0, 1)
    error = np.square(offsets[..., None, :] - coverage[..., None] * directions).sum(axis=-1)
    # Grey may also be half black on white: prefer the explanation with full coverage.
    return coverage, error + 0.05 * np.square(1 - coverage) * lengths


def components(mask: Mask) -> list[Mask]:
    """The 4-connected regions of a mask, by propagating the largest label until convergence."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread = np.where(mask, np.maximum.reduce((labels, *around)), 0)
        # A label is the index of a pixel in the region, so jump to the label of that pixel.
        spread = np.append(0, spread)[spread]
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _soften(coverage: Array) -> Array:
    """One pass of the binomial blur (1, 2, 1) / 4 along both axes."""
    padded = np.pad(coverage, 1)
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4


def _recognize(coverage: Array, colour: str, shapes: Sequence[str]) -> Detection:
    """The shape whose drawing of equal area and centroid overlaps best.

    Drawings are tried both sharp and blurred; otherwise a blurred square would match a circle.
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
    """Whether the detected objects are exactly those in the short caption of `scene`.

    The short caption is the criterion even if the image was generated from a rich caption: sizes,
    places and colours that it does not name are free.

    The number of objects and their shapes must match; so must colours in the tasks colours,
    position and colour attribution. In the position task, the offset from the second object to the
    first must point in the direction of the relation, and be larger along its axis than across.
    """
    if kinds(scene, scene.objects) != kinds(scene, found):
        return False
    if scene.relation is None:
        return True
    wanted = (scene.objects[0].shape, scene.objects[0].colour)
    first, second = sorted(found, key=lambda d: (d.shape, d.colour) != wanted)
    return holds(scene.relation, first, second)


def kinds(scene: Scene, things: Iterable[Object | Detection]) -> list[tuple[str, str]]:
    """Shape and colour of some objects, sorted; no colour where the short caption names none."""
    coloured = scene.task in COLOURED
    return sorted((thing.shape, thing.colour if coloured else "") for thing in things)


def holds(relation: str, first: Detection, second: Detection) -> bool:
    """Whether a relation, a key of `RELATIONS`, is true of two objects."""
    x, y = first.x - second.x, first.y - second.y
    along_x, along_y = RELATIONS[relation]
    along, across = (x * along_x, y) if along_x else (y * along_y, x)
    return along > abs(across)


def judge(data: Shapes, scenes: Sequence[Scene], images: Tensor) -> list[bool]:
    """Whether each image (n, h, w, 3) uint8 matches its scene, with shapes and colours of `data`.

    A region counts as an object from a quarter of the area of the smallest object of `data`.
    """
    found = detections(data, scenes, images)
    return [matches(scene, things) for scene, things in zip(scenes, found, strict=True)]


def detections(data: Shapes, scenes: Sequence[Scene], images: Tensor) -> list[list[Detection]]:
    """The objects that `judge` sees in each image, whose scene states the background."""
    least_radius = min(least for least, _ in data.sizes.values())
    least_area = min(area_and_centroid(shape)[0] for shape in data.shapes) * least_radius**2 / 4
    return [
        detect(
            image.numpy(),
            shapes=data.shapes,
            colours=data.colours,
            background=scene.background,
            least_area=least_area,
        )
        for scene, image in zip(scenes, images, strict=True)
    ]
