import math
from collections import Counter

import numpy as np
import pytest
import torch

from mmdit.data.captions import TASKS, Scene, short_caption
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.metrics.compositional import detections
from mmdit.metrics.diversity import (
    CaptionDiversity,
    attributes,
    entropy,
    pixel_deviation,
)

DATA = Shapes(split="validation")
M = 12  # images of a prompt


def scene_of(task: str, caption: str | None = None) -> Scene:
    """The first scene of a task, or the first with a caption."""
    scenes = (DATA.scene_for_task(task, index) for index in range(2000))
    return next(scene for scene in scenes if caption in (None, short_caption(scene)))


def drawn(scene: Scene, count: int, start: int = 10**9) -> list[Scene]:
    return [DATA.scene_like(scene, start + i) for i in range(count)]


def images_of(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([DATA.render(scene) for scene in scenes]))


# --- scenes of the same caption ---


@pytest.mark.parametrize("task", TASKS)
def test_scenes_like_another_have_its_short_caption(task):
    for index in range(20):
        scene = DATA.scene_for_task(task, index)
        others = drawn(scene, 5)
        assert {short_caption(other) for other in others} == {short_caption(scene)}
        assert len(set(others)) == 5 and scene not in others


@pytest.mark.parametrize(
    ("task", "caption"), [("two_object", "a circle and a square"), ("counting", "three squares")]
)
def test_scenes_like_another_are_distributed_as_those_of_the_task(task, caption):
    """Against rejection: all scenes of the task, of which those with the caption are kept."""
    every = [DATA.scene_for_task(task, index) for index in range(1800)]
    kept = [scene for scene in every if short_caption(scene) == caption]
    like = drawn(kept[0], len(kept))
    for name, attribute in attributes(kept[0], DATA.grid).items():
        counts = [Counter(attribute(s.objects) for s in scenes) for scenes in (kept, like)]
        pairs = np.array([(counts[0][v], counts[1][v]) for v in counts[0] | counts[1]])
        chi_square = (np.subtract(*pairs.T) ** 2 / pairs.sum(1)).sum()
        freedom = len(pairs) - 1
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4, name


def test_what_a_split_never_shows_has_no_scenes():
    scene = DATA.scene_for_task("single_object", 0)
    other = scene._replace(objects=(scene.objects[0]._replace(shape="star"),))
    with pytest.raises(ValueError, match="never shows 'a star'"):
        DATA.scene_like(other, 0)


# --- entropy ---


def mean_entropy(p: np.ndarray, n: int, repeats: int = 400) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([entropy(rng.choice(len(p), n, p=p)) for _ in range(repeats)]))


def plug_in(values: np.ndarray) -> float:
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(("n", "most"), [(24, 0.06), (12, 0.1)])
@pytest.mark.parametrize("k", [2, 4, 12])
@pytest.mark.parametrize("equal", [True, False])
def test_the_entropy_of_known_distributions_is_hardly_biased(n, most, k, equal):
    p = np.ones(k) if equal else 1 / np.arange(1, k + 1)
    p /= p.sum()
    assert mean_entropy(p, n) == pytest.approx(-(p * np.log(p)).sum(), abs=most)


def test_many_values_are_estimated_from_few_draws():
    p, rng = np.ones(30) / 30, np.random.default_rng(0)
    naive = np.mean([plug_in(rng.choice(30, 24)) for _ in range(200)])
    assert math.log(30) - naive > 0.6
    assert mean_entropy(p, 24) == pytest.approx(math.log(30), abs=0.15)


@pytest.mark.parametrize("n", [1, 2, 8, 24])
def test_one_value_has_no_entropy_and_all_different_ones_a_finite_one(n):
    assert entropy(["same"] * n) == 0
    assert math.log(n) <= entropy(range(n)) < math.inf


# --- attributes ---


@pytest.mark.parametrize("task", TASKS)
def test_what_is_detected_has_the_attributes_of_what_is_drawn(task):
    scenes = [other for i in range(4) for other in drawn(DATA.scene_for_task(task, i), 4)]
    found = detections(DATA, scenes, images_of(scenes))
    for scene, things in zip(scenes, found, strict=True):
        for attribute in attributes(scene, DATA.grid).values():
            assert attribute(things) == attribute(scene.objects)


# --- diversity ---


@pytest.fixture(scope="module")
def prompts() -> list[Scene]:
    return [scene_of(task) for task in TASKS if task != "counting"] + [
        scene_of("counting", "two circles")
    ]


def test_the_datas_own_scenes_have_diversity_one_and_a_single_image_zero(prompts):
    measure = CaptionDiversity(data=DATA, scenes=prompts, members=M)
    full = images_of([other for i, p in enumerate(prompts) for other in drawn(p, M, i * 10**6)])
    found = measure(full)
    assert (found.place, found.colour) == (pytest.approx(1, abs=0.2), pytest.approx(1, abs=0.2))
    assert found.left_out == 0 and found.mean == (found.place + found.colour) / 2
    same = images_of([own for p in prompts for own in drawn(p, 1) * M])
    assert measure(same) == (0, 0, 0)
    assert pixel_deviation(same, M) == 0 and pixel_deviation(full, M) > 15


def test_place_and_colour_are_told_apart(prompts):
    [single, *_] = prompts

    def altered(**change) -> torch.Tensor:
        scenes = [s._replace(objects=(s.objects[0]._replace(**change),)) for s in drawn(single, M)]
        return images_of(scenes)

    measure = CaptionDiversity(data=DATA, scenes=[single], members=M)
    in_one_place, of_one_colour = measure(altered(x=0.25, y=0.75)), measure(altered(colour="red"))
    assert in_one_place.place == 0 and in_one_place.colour > 0.6
    assert of_one_colour.colour == 0 and of_one_colour.place > 0.6
    two = altered(x=0.25, y=0.75)
    two[: M // 2] = altered(x=0.25, y=0.25)[: M // 2]
    assert measure(two).place == pytest.approx(0.5, abs=0.15)  # log 2 / log 4


def test_only_right_images_count_and_prompts_with_few_are_left_out(prompts):
    [single, *_] = prompts
    measure = CaptionDiversity(data=DATA, scenes=[single], members=M)
    images = images_of(drawn(single, 1) * M)
    different = images_of(drawn(scene_of("counting", "two squares"), M))
    images[8:] = different[8:]
    assert measure(images) == (0, 0, 0)
    images[7] = different[7]
    found = measure(images)
    assert found.left_out == 1 and all(map(math.isnan, (found.place, found.colour, found.mean)))


def test_what_a_caption_leaves_no_freedom_is_not_counted():
    four = scene_of("counting", "four circles")  # in a layout of four cells
    found = CaptionDiversity(data=DATA, scenes=[four], members=M)(images_of(drawn(four, M)))
    assert math.isnan(found.place) and found.mean == found.colour > 0.6
    named = scene_of("colours")
    found = CaptionDiversity(data=DATA, scenes=[named], members=M)(images_of(drawn(named, M)))
    assert math.isnan(found.colour) and found.mean == found.place > 0.6


def test_bad_numbers_of_images_are_rejected(prompts):
    with pytest.raises(UserError, match="members=7"):
        CaptionDiversity(data=DATA, scenes=prompts, members=7)
    measure = CaptionDiversity(data=DATA, scenes=prompts[:1], members=M)
    with pytest.raises(UserError, match="2 images are not 12 images for each of 1 prompts"):
        measure(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))


# --- pixels ---


def test_pixel_deviation_is_within_groups_alone():
    images = torch.zeros(6, 2, 2, 3, dtype=torch.uint8)
    images[3:] = 200  # another prompt
    assert pixel_deviation(images, 3) == 0
    images[:3, 0, 0, 0] = torch.tensor([0, 30, 60], dtype=torch.uint8)  # one of 12 values
    assert pixel_deviation(images, 3) == pytest.approx(600**0.5 / 12 / 2)
    assert pixel_deviation(images[:3], 3) == pytest.approx(600**0.5 / 12)


@pytest.mark.parametrize("members", [0, 4, 7])
def test_images_that_cannot_be_grouped_are_rejected(members):
    with pytest.raises(UserError, match=f"6 images are not {members} images"):
        pixel_deviation(torch.zeros(6, 2, 2, 3, dtype=torch.uint8), members)
