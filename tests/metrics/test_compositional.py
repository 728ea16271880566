from collections import deque

import numpy as np
import pytest
import torch

from mmdit.data.captions import TASKS, Scene
from mmdit.data.drawing import SHAPES, Image, Object, draw
from mmdit.data.shapes import Shapes
from mmdit.metrics.compositional import Detection, components, detect, judge, matches

SHAPE_NAMES = ("circle", "square", "triangle")
COLOUR_NAMES = ("red", "green", "blue", "yellow", "purple", "cyan")


def scenes_and_images(data: Shapes, task: str, count: int) -> tuple[list[Scene], torch.Tensor]:
    scenes = [data.scene_for_task(task, index) for index in range(count)]
    return scenes, torch.from_numpy(np.stack([data.render(scene) for scene in scenes]))


def noisy(images: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 12 * noise).round().clamp(0, 255).byte()


def blurred(images: torch.Tensor) -> torch.Tensor:
    channels_first = images.permute(0, 3, 1, 2).float()
    padded = torch.nn.functional.pad(channels_first, (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, 3, 1).round().byte().permute(0, 2, 3, 1)


def look(image: Image, background: str = "white") -> list[Detection]:
    return detect(image, shapes=SHAPE_NAMES, colours=COLOUR_NAMES, background=background)


def thing(shape: str, colour: str, x: float, y: float) -> Object:
    return Object(shape, colour, "medium", x, y, 0.18)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("image_size", "count"), [(32, 100), (64, 40), (96, 20)])
def test_true_images_are_right(task, image_size, count):
    data = Shapes(split="validation", image_size=image_size)
    assert np.mean(judge(data, *scenes_and_images(data, task, count))) >= 0.99


@pytest.mark.parametrize("task", TASKS)
def test_true_images_stay_right_under_noise_and_blur(task):
    data = Shapes(split="held_out")
    scenes, images = scenes_and_images(data, task, 30)
    for worse in (noisy(images), blurred(images), noisy(blurred(images))):
        assert np.mean(judge(data, scenes, worse)) >= 0.99


def test_every_shape_colour_size_and_background_is_told_apart():
    data = Shapes(
        split="validation",
        image_size=64,
        shapes=tuple(SHAPES),
        colours=("red", "green", "blue", "yellow", "purple", "cyan", "orange", "pink", "brown"),
        sizes={"small": (0.08, 0.10), "large": (0.16, 0.20)},
        backgrounds=("white", "black", "grey"),
    )
    assert np.mean(judge(data, *scenes_and_images(data, "colour_attribution", 60))) >= 0.99


@pytest.mark.parametrize("task", TASKS)
def test_images_of_other_prompts_are_right_only_by_chance(task):
    data = Shapes(split="validation")
    scenes, images = scenes_and_images(data, task, 80)
    # Two prompts of three shapes, or of three shapes and three numbers, often agree.
    chance = {"single_object": 1 / 3, "two_object": 1 / 3, "counting": 1 / 9}.get(task, 1 / 18)
    assert np.mean(judge(data, scenes, images.roll(40, 0))) <= chance + 0.17


def test_a_detection_says_where_and_how_large():
    for shape in SHAPE_NAMES:
        [found] = look(draw([thing(shape, "blue", 0.3, 0.6)], "white", 64))
        assert (found.shape, found.colour) == (shape, "blue")
        assert found.radius == pytest.approx(0.18, rel=0.03)
        assert found.x == pytest.approx(0.3, abs=0.01)
        assert found.y == pytest.approx(0.6, abs=0.06)  # a triangle's mass lies below its middle


def test_an_empty_image_and_a_speck_have_no_objects():
    image = draw([], "white", 32)
    assert look(image) == []
    image[5:8, 5:8] = 0
    assert look(image) == []


def test_touching_objects_of_two_colours_are_two():
    left, right = thing("square", "red", 0.35, 0.5), thing("square", "blue", 0.65, 0.5)
    found = look(draw([left, right], "white", 64))
    assert sorted((d.shape, d.colour) for d in found) == [("square", "blue"), ("square", "red")]


CIRCLE = thing("circle", "red", 0.25, 0.25)
SQUARE = thing("square", "blue", 0.25, 0.75)


@pytest.mark.parametrize(
    ("task", "relation", "asked", "shown", "right"),
    [
        ("single_object", None, [CIRCLE], [CIRCLE._replace(colour="cyan")], True),
        ("single_object", None, [CIRCLE], [SQUARE], False),
        ("single_object", None, [CIRCLE], [], False),
        ("single_object", None, [CIRCLE], [CIRCLE, SQUARE], False),
        ("colours", None, [CIRCLE], [CIRCLE._replace(x=0.75)], True),
        ("colours", None, [CIRCLE], [CIRCLE._replace(colour="cyan")], False),
        ("two_object", None, [CIRCLE, SQUARE], [SQUARE._replace(colour="red"), CIRCLE], True),
        ("two_object", None, [CIRCLE, SQUARE], [CIRCLE], False),
        ("counting", None, [CIRCLE] * 2, [CIRCLE, CIRCLE._replace(colour="cyan", y=0.75)], True),
        ("counting", None, [CIRCLE] * 2, [CIRCLE, SQUARE], False),
        ("counting", None, [CIRCLE] * 3, [CIRCLE, CIRCLE._replace(y=0.75)], False),
        ("colour_attribution", None, [CIRCLE, SQUARE], [SQUARE, CIRCLE], True),
        ("colour_attribution", None, [CIRCLE, SQUARE],
         [CIRCLE._replace(colour="blue"), SQUARE._replace(colour="red")], False),
        ("position", "above", [CIRCLE, SQUARE], [SQUARE, CIRCLE], True),
        ("position", "above", [CIRCLE, SQUARE], [CIRCLE._replace(y=0.75),
                                                 SQUARE._replace(y=0.25)], False),
        ("position", "above", [CIRCLE, SQUARE], [CIRCLE, SQUARE._replace(x=0.75, y=0.3)], False),
        ("position", "left of", [CIRCLE, SQUARE], [CIRCLE, SQUARE._replace(x=0.75, y=0.3)], True),
        ("position", "right of", [CIRCLE, SQUARE], [CIRCLE, SQUARE._replace(x=0.75, y=0.3)], False),
    ],
)  # fmt: skip
def test_what_counts_as_right(task, relation, asked, shown, right):
    scene = Scene(task, tuple(asked), relation, "white")
    assert matches(scene, look(draw(shown, "white", 64))) is right


def test_components_are_those_of_a_flood_fill():
    rng = np.random.default_rng(0)
    for fill in (0.3, 0.5, 0.6, 0.9):
        mask = rng.random((20, 17)) < fill
        ours = {frozenset(zip(*np.nonzero(part), strict=True)) for part in components(mask)}
        assert ours == flood_fill(mask)


def flood_fill(mask: np.ndarray) -> set[frozenset[tuple[int, int]]]:
    left, regions = set(zip(*np.nonzero(mask), strict=True)), set()
    while left:
        queue, region = deque([left.pop()]), set()
        while queue:
            row, column = pixel = queue.popleft()
            region.add(pixel)
            for near in ((row - 1, column), (row + 1, column), (row, column - 1),
                         (row, column + 1)):  # fmt: skip
                if near in left:
                    left.remove(near)
                    queue.append(near)
        regions.add(frozenset(region))
    return regions


@pytest.mark.parametrize("task", ["colours", "position", "colour_attribution"])
@pytest.mark.parametrize("image_size", [32, 64])
def test_textures_are_told_from_colours(task, image_size):
    data = Shapes(split="validation", image_size=image_size).with_word("striped")
    scenes, images = scenes_and_images(data, task, 30)
    for seen in (images, noisy(images)):
        assert np.mean(judge(data, scenes, seen)) >= 0.99
    plain = [
        scene._replace(
            objects=tuple(
                o._replace(colour="orange" if o.colour == "striped" else o.colour)
                for o in scene.objects
            )
        )
        for scene in scenes
    ]
    drawn = torch.from_numpy(np.stack([data.render(scene) for scene in plain]))
    assert not any(judge(data, scenes, drawn))
