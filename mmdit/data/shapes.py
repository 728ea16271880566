"""Captioned toy images drawn on the fly: a world small enough to learn on a laptop.

Each sample is a pure function of (seed, split, index). It follows one of the six tasks of GenEval
(Ghosh et al. 2023). Some combinations never occur in training, to test whether a model composes or
memorizes.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch

from mmdit.checks import (
    expect,
    flag,
    listed,
    mapping,
    number,
    one_of,
    seed_number,
    whole_number,
)
from mmdit.data import captions
from mmdit.data.buckets import Size
from mmdit.data.caption_sources import Captions
from mmdit.data.captions import COLOURED, NUMBERS, RELATIONS, TASKS, Scene, short_caption
from mmdit.data.composition import Kind, hold_out
from mmdit.data.dataset import Batch
from mmdit.data.drawing import COLOURS, SHAPES, TEXTURES, Image, Object, draw
from mmdit.data.order import ShuffledOrder
from mmdit.keys import generator_for

__all__ = ["SPLITS", "Kind", "Object", "Sample", "Scene", "Shapes", "short_caption"]

SPLITS = ("train", "validation", "held_out")
PAIR_TASKS = ("two_object", "position", "colour_attribution")
DEFAULT_SIZES = {"medium": (0.16, 0.20)}
DEFAULT_WEIGHTS = dict(zip(TASKS, (1.0, 1.0, 1.0, 1.0, 2.0, 2.0), strict=True))
# Half a pixel at 32 pixels: two objects are a pixel apart, so that they can be distinguished.
MARGIN = 1 / 64
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly
INDICES = 1 << 56  # indices per split (and task): 32 such spaces fit below 2**61

T = TypeVar("T")


class Names(TypedDict):
    """What captions may name, beside a scene."""

    grid: int
    name_sizes: bool
    name_background: bool


class Sample(NamedTuple):
    """An image, uint8 (h, w, 3), with its caption and the scene that both describe."""

    image: Image
    caption: str
    scene: Scene


class Shapes:
    """An endless dataset of captioned shapes; indices run from 0 to 2**56 - 1.

    Objects sit in distinct cells of a `grid` x `grid` layout, within `jitter` of the cell's centre,
    and neither overlap nor leave the canvas. All lengths are fractions of the image side, so the
    same index is the same scene at every `image_size`.

    Held out of the splits train and validation, by `seed`: about `held_out_fraction` of the kinds
    (every colour and every shape is still seen), and of the pairs of remaining kinds of different
    shape (both are seen, never together). The split held_out draws only those: a held-out kind for
    tasks of one kind, a held-out pair for tasks of two. The random streams of the splits are keyed
    by disjoint ranges, so train and validation share scenes only by chance.

    Args:
        split: 'train', 'validation' or 'held_out'.
        image_size: side in pixels, a multiple of 32.
        seed: seed of everything random, including the choice of held-out combinations.
        shapes, colours: names known to `mmdit.data.drawing`, at least two of each; textures count
            as colours.
        sizes: name -> (least, greatest) radius. Captions name sizes only if there are several.
        backgrounds: background colours. Captions name them only if there are several.
        grid: number of rows and of columns of the layout.
        jitter: largest offset of an object from its cell's centre, along x and along y.
        max_count: largest number of objects in the counting task; `grid**2` by default.
        task_weights: task -> relative frequency; tasks that are not listed do not occur.
        rich_fraction: fraction of rich captions, which describe everything.
        every_caption: each image has all captions that are true of it, of which each step sees one.
        held_out_fraction: in [0, 0.5]; if above 0, at least one kind and one pair are held out.
        containing: draw only scenes with an object of this shape or colour, to teach or to test one
            word; it comes in each colour, or shape, in turn, and the tasks are spread evenly, so
            that a few images show all of its uses.
        samples: size of the training set; larger indices are valid too.

    Raises:
        ValueError: an argument is out of range, or the arguments do not fit each other.
    """

    name = "shapes"
    kinds = ("text",)  # of captions

    def __init__(
        self,
        *,
        split: str = "train",
        image_size: int = 32,
        seed: int = 0,
        shapes: Sequence[str] = ("circle", "square", "triangle"),
        colours: Sequence[str] = ("red", "green", "blue", "yellow", "purple", "cyan"),
        sizes: Mapping[str, tuple[float, float]] = DEFAULT_SIZES,
        backgrounds: Sequence[str] = ("white",),
        grid: int = 2,
        jitter: float = 0.03,
        max_count: int | None = None,
        task_weights: Mapping[str, float] = DEFAULT_WEIGHTS,
        rich_fraction: float = 0.5,
        every_caption: bool = False,
        held_out_fraction: float = 0.125,
        containing: str | None = None,
        samples: int = 20_000,
    ) -> None:
        for field, names in (
            ("shapes", shapes),
            ("colours", colours),
            ("backgrounds", backgrounds),
        ):
            listed(field, names)
        mapping("sizes", sizes)
        for name, radii in sizes.items():
            listed(f"sizes[{name!r}]", radii)
            expect(len(radii) == 2, f"sizes[{name!r}]", radii, "must be (least, greatest) radius")
            for radius in radii:
                number(f"sizes[{name!r}]", radius)
        mapping("task_weights", task_weights)
        for task, weight in task_weights.items():
            number(f"task_weights[{task!r}]", weight, 0)
        whole_number("grid", grid, 1)
        self.split, self.image_size, self.seed = split, image_size, seed
        self.samples = samples
        self.shapes, self.colours = tuple(shapes), tuple(colours)
        self.backgrounds = tuple(backgrounds)
        self.sizes = {name: (float(least), float(most)) for name, (least, most) in sizes.items()}
        self.grid, self.jitter = grid, jitter
        self.max_count = min(grid**2, len(NUMBERS) - 1) if max_count is None else max_count
        self.task_weights = {task: float(weight) for task, weight in task_weights.items()}
        self.rich_fraction, self.held_out_fraction = rich_fraction, held_out_fraction
        self.containing, self.every_caption = containing, every_caption
        self._check()
        # Keyed by the seed alone, outside the spaces of the indices: the same for every split.
        rng = _stream(self.seed, 2**64 - 1)
        self._composition = hold_out(rng, self.colours, self.shapes, held_out_fraction)
        self._choices = {task: self._choices_of(task) for task in TASKS}
        for task, weight in self.task_weights.items():
            if weight:
                self._require(task)
        self._thresholds = list(itertools.accumulate(self.task_weights.values()))

    def __getitem__(self, index: int) -> Sample:
        scene, caption = self._draw(None, index)
        return Sample(self.render(scene), caption, scene)

    def scene(self, index: int) -> Scene:
        """The scene of a sample, without rendering it."""
        return self._draw(None, index)[0]

    def caption(self, index: int) -> str:
        """The caption of a sample, without rendering it."""
        return self._draw(None, index)[1]

    def scene_for_task(self, task: str, index: int) -> Scene:
        """The `index`-th scene of this split for one task, from a separate random stream.

        Raises:
            ValueError: the task is unknown, or cannot be posed in this dataset.
        """
        one_of("task", task, TASKS)
        self._require(task)
        return self._draw(task, index)[0]

    def scene_like(self, scene: Scene, index: int) -> Scene:
        """The `index`-th scene among those of this split that have the short caption of `scene`.

        What the caption names is kept; all else is drawn as for any scene of the task.

        Raises:
            ValueError: this split never shows what the caption asks for.
        """
        choices = self._kinds_like(scene)
        if not choices:
            raise ValueError(f"split {self.split!r} never shows {short_caption(scene)!r}")
        space = SPLITS.index(self.split) * 8 + 7  # the last of a split, which no task uses
        rng = _stream(self.seed, space * INDICES + index)
        return self._arrange(rng, scene.task, _pick(rng, choices), scene.relation)

    def render(self, scene: Scene) -> Image:
        """The image of a scene at this dataset's resolution: uint8 (h, w, 3)."""
        return draw(scene.objects, scene.background, self.image_size)

    def __len__(self) -> int:
        """The number of training samples; evaluations may use larger indices."""
        return self.samples

    def batch(self, indices: Iterable[int], step: int = 0) -> Batch:
        """Images as one uint8 tensor (b, h, w, 3), the same at every step, and captions."""
        numbers = list(indices)
        cached = [self.cacheable(index) for index in numbers]
        images = torch.from_numpy(np.stack([image for image, _ in cached]))
        picked = zip(cached, numbers, strict=True)
        return Batch(images, [self.pick(own, index, step) for (_, own), index in picked])

    def square(self, indices: Iterable[int]) -> Batch:
        """The same as `batch`: the images are square."""
        return self.batch(indices)

    def order(self, *, batch_size: int, seed: int) -> ShuffledOrder:
        """The training order. The batch size does not matter, since all images have one size."""
        del batch_size
        return ShuffledOrder(size=self.samples, seed=seed)

    def size_of(self, index: int) -> Size:
        """Height and width of every image."""
        del index
        return self.image_size, self.image_size

    def cacheable(self, index: int) -> tuple[Image, Captions]:
        """The image, identical at every step, and its captions."""
        sample = self[index]
        if not self.every_caption:
            return sample.image, {"text": (sample.caption,)}
        return sample.image, {"text": captions.true_captions(sample.scene, **self._names)}

    def pick(self, captions: Mapping[str, Sequence[T]], index: int, step: int) -> T:
        """The caption of a sample that step `step` sees."""
        own = captions["text"]
        if len(own) == 1:
            return own[0]
        return own[generator_for(self.seed, "caption", index, step).initial_seed() % len(own)]

    def identity(self) -> dict[str, Any]:
        """Plain data that determines `cacheable`: equal identities give equal images, captions."""
        off = (None, False)  # options that earlier versions did not have
        stated = {
            name: value for name, value in vars(self).items() if not any(value is o for o in off)
        }
        return {name: value for name, value in stated.items() if not name.startswith("_")}

    def fingerprint(self) -> dict[str, Any]:
        """Empty: the config alone determines the images."""
        return {}

    def prompts(self) -> list[str]:
        """Four short captions for each task, of scenes in this split."""
        return [short_caption(self.scene_for_task(task, i)) for task in TASKS for i in range(4)]

    def view(self, split: str) -> "Shapes":
        """Another split of the same world."""
        return Shapes(**{**self.identity(), "split": split})

    def with_word(self, word: str) -> "Shapes":
        """The same world with one shape or colour more, in scenes that all contain it.

        Raises:
            ValueError: there is no such shape or colour.
        """
        field = "shapes" if word in SHAPES else "colours"
        names = list(dict.fromkeys([*getattr(self, field), word]))
        changes = {field: names, "containing": word, "held_out_fraction": 0}
        return Shapes(**{**self.identity(), **changes})

    @property
    def words(self) -> list[str]:
        """Every word of every caption, sorted: the vocabulary of a word-level tokenizer."""
        return captions.words_of(
            shapes=self.shapes,
            colours=self.colours,
            sizes=self.sizes,
            backgrounds=self.backgrounds,
            max_count=self.max_count,
        )

    @property
    def held_out_kinds(self) -> frozenset[Kind]:
        """Kinds that neither train nor validation ever shows."""
        return frozenset(self._composition.held_out_kinds)

    @property
    def held_out_pairs(self) -> frozenset[frozenset[Kind]]:
        """Pairs of shown kinds that neither train nor validation ever shows in one image."""
        return frozenset(map(frozenset, self._composition.held_out_pairs))

    def _draw(self, task: str | None, index: int) -> tuple[Scene, str]:
        rng = self._generator(task, index)
        if task is None:
            spread = (index + self.seed + 0.5) * GOLDEN % 1
            mark = rng.random() if self.containing is None else spread
            at = bisect.bisect_right(self._thresholds, mark * self._thresholds[-1])
            task = tuple(self.task_weights)[at]
        kinds = _pick(rng, self._choices_at(task, index))
        if task == "counting":
            kinds = kinds * (2 + int(rng.random() * (self.max_count - 1)))
        elif rng.random() < 0.5:
            kinds = kinds[::-1]
        relation = _pick(rng, tuple(RELATIONS)) if task == "position" else None
        scene = self._arrange(rng, task, kinds, relation)
        # The caption is drawn last, so that rich_fraction does not change scenes.
        rich, relate = rng.random() < self.rich_fraction, rng.random() < 0.5
        if not rich:
            return scene, short_caption(scene)
        return scene, captions.rich_caption(scene, relate=relate, **self._names)

    @property
    def _names(self) -> Names:
        """What decides, besides the scene, about its captions."""
        return {
            "grid": self.grid,
            "name_sizes": len(self.sizes) > 1,
            "name_background": len(self.backgrounds) > 1,
        }

    def _generator(self, task: str | None, index: int) -> np.random.Generator:
        """Philox keyed by (seed, space, index): each split has one space, and one for each task."""
        index = operator.index(index)
        if not 0 <= index < INDICES:
            raise ValueError(f"index {index} must be from 0 to 2**56 - 1")
        space = SPLITS.index(self.split) * 8 + (0 if task is None else 1 + TASKS.index(task))
        return _stream(self.seed, space * INDICES + index)

    def _arrange(
        self, rng: np.random.Generator, task: str, kinds: Sequence[Kind], relation: str | None
    ) -> Scene:
        """A scene of these kinds, in order of mention: its cells, sizes and background."""
        if relation is None:
            cells = self._distinct_cells(rng, len(kinds))
        else:
            cells = self._aligned_cells(rng, relation)
        sizes = [_pick(rng, tuple(self.sizes)) for _ in kinds]
        if task == "counting":  # "three small circles" is true of all three
            sizes = sizes[:1] * len(kinds)
        placed = zip(kinds, sizes, cells, strict=True)
        objects = tuple(self._place(rng, kind, size, cell) for kind, size, cell in placed)
        return Scene(task, objects, relation, _pick(rng, self.backgrounds))

    def _kinds_like(self, scene: Scene) -> list[tuple[Kind, ...]]:
        """What this split may show for the short caption of a scene, in its order of mention."""
        if scene.task in COLOURED:
            return [tuple(Kind(thing.colour, thing.shape) for thing in scene.objects)]
        shapes = [thing.shape for thing in scene.objects]
        repeats = len(shapes) if scene.task == "counting" else 1
        ordered = (own for each in self._choices[scene.task] for own in {each, each[::-1]})
        found = [kinds * repeats for kinds in ordered]
        return [kinds for kinds in found if [kind.shape for kind in kinds] == shapes]

    def _place(
        self, rng: np.random.Generator, kind: Kind, size: str, cell: tuple[int, int]
    ) -> Object:
        x, y = ((at + 0.5) / self.grid + _within(rng, -self.jitter, self.jitter) for at in cell)
        return Object(kind.shape, kind.colour, size, x, y, _within(rng, *self.sizes[size]))

    def _distinct_cells(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        free = list(itertools.product(range(self.grid), range(self.grid)))
        return [free.pop(int(rng.random() * len(free))) for _ in range(count)]

    def _aligned_cells(self, rng: np.random.Generator, relation: str) -> list[tuple[int, int]]:
        """Two cells in one column or row that satisfy `relation`."""
        x, y = RELATIONS[relation]
        line = _pick(rng, range(self.grid))
        low, high = _pick(rng, tuple(itertools.combinations(range(self.grid), 2)))
        along = (low, high) if x + y < 0 else (high, low)
        return [(step, line) if x else (line, step) for step in along]

    def _choices_of(self, task: str) -> list[tuple[Kind, ...]]:
        """The kinds, one or two, that this dataset may show for a task; empty if there are none."""
        return [
            kinds
            for kinds in self._choices_in_split(task)
            if self.containing is None or any(self.containing in kind for kind in kinds)
        ]

    def _choices_at(self, task: str, index: int) -> list[tuple[Kind, ...]]:
        """The choices for one sample.

        What they must contain comes in each colour, or shape, in turn, so that a few images of a
        shape show it in as many colours as they can.
        """
        every = self._choices[task]
        if self.containing is None:
            return every
        others = self.colours if self.containing in self.shapes else self.shapes
        wanted = {self.containing, others[(index + self.seed) % len(others)]}
        return [kinds for kinds in every if any(set(kind) == wanted for kind in kinds)] or every

    def _choices_in_split(self, task: str) -> list[tuple[Kind, ...]]:
        """The kinds, one or two, that this split may show for a task; empty if there is no room."""
        room = {"counting": self.max_count}.get(task, self.grid)
        if room < 2 and task in ("counting", *PAIR_TASKS):
            return []
        held_out = self.split == "held_out"
        if task not in PAIR_TASKS:
            composition = self._composition
            shown = composition.held_out_kinds if held_out else composition.kinds
            return [(kind,) for kind in shown]
        if held_out:
            return list(self._composition.held_out_pairs)
        return list(self._composition.pairs(different_shapes=task == "two_object"))

    def _require(self, task: str) -> None:
        if not self._choices[task]:
            raise ValueError(
                f"task {task!r} is impossible in split {self.split!r} with grid {self.grid}, "
                f"max_count {self.max_count}, held_out_fraction {self.held_out_fraction} and "
                f"containing {self.containing}: change them, or leave the task out of task_weights"
            )

    def _check(self) -> None:
        one_of("split", self.split, SPLITS)
        for field, names, known in (
            ("shapes", self.shapes, SHAPES),
            ("colours", self.colours, (*COLOURS, *TEXTURES)),
            ("backgrounds", self.backgrounds, COLOURS),
            ("task_weights", self.task_weights, TASKS),
        ):
            for name in names:
                one_of(field, name, known)
            expect(len(set(names)) == len(names), field, names, "must not repeat a name")
        if self.containing is not None:
            one_of("containing", self.containing, (*self.shapes, *self.colours))
        for field, names in (("shapes", self.shapes), ("colours", self.colours)):
            expect(len(names) >= 2, field, names, "must name at least two")
        both = set(self.colours) & set(self.backgrounds)
        expect(not both, "backgrounds", self.backgrounds, "must not share a colour with colours")
        expect(bool(self.backgrounds), "backgrounds", self.backgrounds, "must name at least one")

        size, most = self.image_size, self.max_count
        whole_number("image_size", size, 32)
        expect(size % 32 == 0, "image_size", size, "must be a multiple of 32")
        seed_number("seed", self.seed)
        whole_number("samples", self.samples, 1)
        number("jitter", self.jitter, 0)
        whole_number("max_count", most, 1)
        room = min(self.grid**2, len(NUMBERS) - 1)
        expect(1 <= most <= room, "max_count", most, f"must be from 1 to {room}")
        number("rich_fraction", self.rich_fraction, 0, 1)
        flag("every_caption", self.every_caption)
        number("held_out_fraction", self.held_out_fraction, 0, 0.5)
        some = any(self.task_weights.values())
        expect(some, "task_weights", self.task_weights, "must not all be zero")

        expect(bool(self.sizes), "sizes", self.sizes, "must name at least one")
        reach = 0.5 / self.grid - self.jitter - MARGIN
        for name, radii in self.sizes.items():
            fits = 0 < radii[0] <= radii[1] <= reach
            expectation = (
                "must be (least, greatest) radius above 0 and at most "
                f"0.5 / grid - jitter - 1/64 = {reach:.4f}, or objects could touch"
            )
            expect(fits, f"sizes[{name!r}]", radii, expectation)


def _stream(seed: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array((seed, position), np.uint64)))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _within(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
