"""Captions of toy scenes: their grammar and vocabulary.

There are two styles. Short captions ask for what the six GenEval tasks test and leave the rest
free; rich captions describe everything in at most `MAX_WORDS` words, dropping places first.

Source of the tasks: Ghosh et al. 2023, GenEval, Sec. 3.
"""

from collections.abc import Iterable
from typing import NamedTuple

from mmdit.data.drawing import COLOURS, SHAPES, TEXTURES, Object

TASKS = (
    "single_object",
    "two_object",
    "counting",
    "colours",
    "position",
    "colour_attribution",
)
COLOURED = ("colours", "position", "colour_attribution")  # whose short captions name colours
RELATIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}  # the direction, x then y (down), in which the first object lies from the second
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"),
    *("nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)
PLACES = {  # by grid, row by row
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top", "top right"),
        *("left", "center", "right"),
        *("bottom left", "bottom", "bottom right"),
    ),
}
MAX_WORDS = 14


class Scene(NamedTuple):
    """The content of an image: one of `TASKS`, the objects in order of mention, and for the
    position task the relation of the first object to the second (a key of `RELATIONS`)."""

    task: str
    objects: tuple[Object, ...]
    relation: str | None
    background: str


def plural(shape: str) -> str:
    """`circle` -> `circles`, `cross` -> `crosses`."""
    return shape + ("es" if shape.endswith("s") else "s")


def short_caption(scene: Scene) -> str:
    """Only what the scene's task asks for: "a circle and a square", "two circles"."""
    first, *rest = scene.objects
    match scene.task:
        case "single_object":
            return _one(first.shape)
        case "two_object":
            return f"{_one(first.shape)} and {_one(rest[0].shape)}"
        case "counting":
            return f"{NUMBERS[len(scene.objects)]} {plural(first.shape)}"
        case "colours":
            return _one(first.colour, first.shape)
    link = scene.relation or "and"
    return f"{_one(first.colour, first.shape)} {link} {_one(rest[0].colour, rest[0].shape)}"


def rich_caption(
    scene: Scene, *, grid: int, relate: bool, name_sizes: bool, name_background: bool
) -> str:
    """Everything in the image: "a red circle top left and a blue square bottom right".

    With `relate`, two objects in one row or column of the grid are described by their relation
    instead of their places; so are any two objects whose places have no name or do not fit.
    """
    ground = f" on {_one(scene.background, 'background')}" if name_background else ""

    def adjectives(thing: Object) -> tuple[str, ...]:
        return (thing.size, thing.colour) if name_sizes else (thing.colour,)

    if scene.task == "counting":
        first = scene.objects[0]
        noun = plural(first.shape)
        return " ".join((NUMBERS[len(scene.objects)], *adjectives(first), noun)) + ground

    names = [_one(*adjectives(thing), thing.shape) for thing in scene.objects]
    relation = _relation(scene.objects, grid)
    related = f" {relation or 'and'} ".join(names) + ground
    if grid not in PLACES or (relate and relation):
        return related
    places = [_place(thing, grid) for thing in scene.objects]
    parts = [f"{name} {place}" for name, place in zip(names, places, strict=True)]
    placed = " and ".join(parts) + ground
    return placed if len(placed.split()) <= MAX_WORDS else related


def true_captions(
    scene: Scene, *, grid: int, name_sizes: bool, name_background: bool
) -> tuple[str, ...]:
    """Every short caption that is true of a scene, whatever its task, and the rich ones."""
    shapes = {thing.shape for thing in scene.objects}
    relation = _relation(scene.objects, grid)
    if scene.task == "counting":
        tasks = ["counting"]
    elif len(scene.objects) == 1:
        tasks = ["single_object", "colours"]
    else:
        tasks = [*(["two_object"] if len(shapes) > 1 else []), "colour_attribution"]
        tasks += ["position"] if relation else []
    found = [
        short_caption(scene._replace(task=task, relation=relation if task == "position" else None))
        for task in tasks
    ]
    found += [
        rich_caption(
            scene, grid=grid, relate=relate, name_sizes=name_sizes, name_background=name_background
        )
        for relate in (True, False)
    ]
    return tuple(dict.fromkeys(found))


def words_of(
    *,
    shapes: Iterable[str],
    colours: Iterable[str],
    sizes: Iterable[str],
    backgrounds: Iterable[str],
    max_count: int,
) -> list[str]:
    """Every word that a caption can contain, and a few more worth trying in prompts; sorted."""
    shapes = tuple(shapes)
    phrases = ("a", "an", "and", "at", "on", "background", "centre", *RELATIONS)
    places = tuple(place for grid in PLACES.values() for place in grid)
    counts = NUMBERS[1 : max_count + 1]
    names = (*shapes, *map(plural, shapes), *colours, *sizes, *backgrounds)
    return sorted({word for text in (*phrases, *places, *counts, *names) for word in text.split()})


def vocabulary(*, textures: bool = False) -> list[str]:
    """Every word of every possible `Shapes`, for a word-level tokenizer.

    Args:
        textures: with the names of textures, too; without them, ids are those of earlier models.
    """
    return words_of(
        shapes=SHAPES,
        colours=(*COLOURS, *(TEXTURES if textures else ())),
        sizes=("small", "medium", "large"),
        backgrounds=COLOURS,
        max_count=len(NUMBERS) - 1,
    )


def cell_of(thing: Object, grid: int) -> tuple[int, int]:
    """The (column, row) of the layout cell that contains the centre of an object."""
    return int(thing.x * grid), int(thing.y * grid)


def _one(*parts: str) -> str:
    return " ".join(("an" if parts[0][0] in "aeiou" else "a", *parts))


def _place(thing: Object, grid: int) -> str:
    column, row = cell_of(thing, grid)
    return PLACES[grid][row * grid + column]


def _relation(objects: tuple[Object, ...], grid: int) -> str | None:
    """The relation of the first of two objects to the second, if they share a row or column."""
    if len(objects) != 2:
        return None
    (column, row), (other_column, other_row) = (cell_of(thing, grid) for thing in objects)
    if column == other_column:
        return "above" if row < other_row else "below"
    if row == other_row:
        return "left of" if column < other_column else "right of"
    return None
