"""Anti-aliased drawing of flat shapes from signed distances, at any resolution.

Lengths are fractions of the image side and y points down, so a list of shapes is the same image at
32 and at 64 pixels: only the width of the anti-aliased edge depends on the resolution.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]]
Image: TypeAlias = NDArray[np.uint8]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 35),
    "green": (25, 160, 50),
    "blue": (30, 60, 230),
    "yellow": (250, 210, 0),
    "purple": (150, 30, 190),
    "cyan": (0, 200, 225),
    "orange": (255, 125, 0),
    "pink": (255, 110, 190),
    "brown": (120, 65, 20),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
}

# A texture takes the place of a colour: bars of two colours, of which captions name neither.
TEXTURES: dict[str, tuple[str, str]] = {"striped": ("black", "orange")}
STRIPES = 8  # pairs of bars in the height of an image


class Object(NamedTuple):
    """A shape in an image: names of `shape`, `colour` and `size`; lengths as image fractions.

    The colour may be a texture. (x, y) is the centre of the shape's bounding box and `radius` half
    the box's longer side (the square, which would look larger than the others, fills only 0.85 of
    it).
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


# Signed distances in units of the radius, negative inside. Outside a corner they are lower bounds
# of the true distance: corners stay sharp, and coverage depends only on half a pixel at the edge.


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _triangle(x: Array, y: Array) -> Array:
    """Equilateral, apex up, base as wide as the box."""
    half_height = math.sqrt(3) / 2
    return np.maximum(y - half_height, half_height * np.abs(x) - 0.5 * (y + half_height))


def _diamond(x: Array, y: Array) -> Array:
    return (np.abs(x) + np.abs(y) - 1) * math.sqrt(0.5)


def _cross(x: Array, y: Array) -> Array:
    """Two bars whose thickness is 0.36 of their length."""
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.36), np.maximum(x - 0.36, y - 1))


def _star(x: Array, y: Array) -> Array:
    """A pentagram: the points on the inner side of at least four of its five lines."""
    angles = np.pi / 2 + 2 * np.pi / 5 * np.arange(5, dtype=np.float32)
    normal_x, normal_y = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    return np.partition(normal_x * x + normal_y * y, 3, axis=0)[3] - math.cos(2 * math.pi / 5)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
}


class Window(NamedTuple):
    """The covered fraction of each pixel, `coverage` in [0, 1] (h, w), at rows and columns."""

    rows: slice
    columns: slice
    coverage: Array


@cache
def _pixel_centres(image_size: int) -> Array:
    return (np.arange(image_size, dtype=np.float32) + 0.5) / image_size


def cover(shape: str, x: float, y: float, radius: float, image_size: int) -> Window:
    """The coverage of one shape, computed only in the window of pixels that it can touch."""

    def reach(middle: float) -> slice:
        low, high = (middle - radius) * image_size - 1, (middle + radius) * image_size + 1
        return slice(max(0, math.floor(low)), min(image_size, math.ceil(high)))

    centres, rows, columns = _pixel_centres(image_size), reach(y), reach(x)
    across, down = (centres[columns] - x) / radius, (centres[rows] - y) / radius
    distance = SHAPES[shape](across[None, :], down[:, None])
    return Window(rows, columns, (0.5 - distance * (radius * image_size)).clip(0, 1))


@cache
def area_and_centroid(shape: str) -> tuple[float, float, float]:
    """Area, x and y of the centroid of a shape of radius 1 around the origin, by fine rendering."""
    size = 512
    coverage = cover(shape, 0.5, 0.5, 0.5, size).coverage
    axis = (_pixel_centres(size) - 0.5) * 2
    total = float(coverage.sum())
    x, y = float((coverage @ axis).sum()) / total, float((axis @ coverage).sum()) / total
    return total * (2 / size) ** 2, x, y


@cache
def _ground(background: str, image_size: int) -> Array:
    return np.tile(np.array(COLOURS[background], np.float32), (image_size, image_size, 1))


def rgb_of(colour: str, rows: slice, image_size: int) -> Array:
    """The RGB of a colour, (3,), or of a texture at some rows of an image, (rows, 1, 3)."""
    if colour in COLOURS:
        return np.array(COLOURS[colour], np.float32)
    first, second = (np.array(COLOURS[name], np.float32) for name in TEXTURES[colour])
    bar = np.floor(_pixel_centres(image_size)[rows] * (2 * STRIPES)) % 2
    return np.where(bar[:, None, None] > 0, second, first)


def draw(objects: Sequence[Object], background: str, image_size: int) -> Image:
    """Draw the objects in order on a plain background: uint8 (image_size, image_size, 3)."""
    canvas = _ground(background, image_size).copy()
    for thing in objects:
        rows, columns, coverage = cover(thing.shape, thing.x, thing.y, thing.radius, image_size)
        window = canvas[rows, columns]
        window += coverage[..., None] * (rgb_of(thing.colour, rows, image_size) - window)
    return np.rint(canvas).astype(np.uint8)
