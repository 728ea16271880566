import math
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from mmdit.data.captions import (
    MAX_WORDS,
    NUMBERS,
    RELATIONS,
    TASKS,
    cell_of,
    plural,
    vocabulary,
)
from mmdit.data.drawing import COLOURS, SHAPES, TEXTURES, area_and_centroid, cover, draw
from mmdit.data.shapes import MARGIN, SPLITS, Kind, Sample, Scene, Shapes, short_caption
from mmdit.errors import UserError

VARIED = {
    "shapes": tuple(SHAPES),
    "colours": ("red", "green", "blue", "orange"),
    "sizes": {"small": (0.08, 0.10), "large": (0.16, 0.20)},
    "backgrounds": ("white", "black"),
}
FINE = {"grid": 3, "sizes": {"medium": (0.10, 0.13)}, "jitter": 0.02}
DATASETS = pytest.mark.parametrize("arguments", [{}, VARIED, FINE], ids=["plain", "varied", "fine"])


def equal(a: Sample, b: Sample) -> bool:
    return np.array_equal(a.image, b.image) and a[1:] == b[1:]


def kinds_of(scene: Scene) -> set[Kind]:
    return {Kind(thing.colour, thing.shape) for thing in scene.objects}


def pairs_of(scene: Scene) -> set[frozenset[Kind]]:
    return set(map(frozenset, combinations(kinds_of(scene), 2)))


@DATASETS
def test_a_sample_is_a_pure_function_of_seed_split_and_index(arguments):
    once, again = (Shapes(split="train", seed=5, **arguments) for _ in range(2))
    backwards = [again[index] for index in reversed(range(20))][::-1]
    assert all(equal(once[index], sample) for index, sample in enumerate(backwards))
    assert equal(once[7], once[np.int64(7)])


def test_samples_differ_between_indices_splits_seeds_and_tasks():
    scenes = [
        *(Shapes(split=split, seed=seed).scene(i) for split in SPLITS for seed in (0, 1)
          for i in range(50)),
        *(Shapes(split="train").scene_for_task("counting", i) for i in range(50)),
    ]  # fmt: skip
    assert len(set(scenes)) == len(scenes)


def test_one_sample_never_changes():
    # Runs are compared across machines and versions: a change here makes them incomparable.
    scene = Shapes(split="train", seed=0).scene(0)
    [thing] = scene.objects
    assert (scene.task, thing.shape, thing.colour) == ("single_object", "circle", "green")
    assert (thing.x, thing.y, thing.radius) == pytest.approx((0.73665633, 0.27679266, 0.19944264))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_combinations_are_never_shown(split):
    data = Shapes(split=split)
    scenes = [data.scene(index) for index in range(20_000)]
    shown = set.union(*map(kinds_of, scenes))
    together = set.union(*map(pairs_of, scenes))
    everything = {Kind(colour, shape) for colour in data.colours for shape in data.shapes}
    assert shown == everything - data.held_out_kinds
    assert together == set(map(frozenset, combinations(shown, 2))) - data.held_out_pairs


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("fraction", [0.01, 0.125, 0.4])
def test_what_is_held_out(seed, fraction):
    data = Shapes(split="train", seed=seed, held_out_fraction=fraction)
    assert data.held_out_kinds == Shapes(split="held_out", seed=seed,
                                         held_out_fraction=fraction).held_out_kinds  # fmt: skip
    shown = {Kind(c, s) for c in data.colours for s in data.shapes} - data.held_out_kinds
    assert {kind.colour for kind in shown} == set(data.colours)
    assert {kind.shape for kind in shown} == set(data.shapes)
    assert len(data.held_out_kinds) == max(1, round(18 * fraction))
    pairs = sum(a.shape != b.shape for a, b in combinations(shown, 2))
    assert len(data.held_out_pairs) == max(1, round(pairs * fraction))
    assert not set().union(*data.held_out_pairs) & data.held_out_kinds


def test_held_out_depends_on_the_seed():
    assert len({Shapes(split="train", seed=seed).held_out_pairs for seed in range(5)}) == 5


def test_the_held_out_split_shows_only_held_out_combinations():
    data = Shapes(split="held_out")
    for scene in (data.scene(index) for index in range(2000)):
        kinds = kinds_of(scene)
        assert kinds <= data.held_out_kinds or frozenset(kinds) in data.held_out_pairs
    asked = {task: data.scene_for_task(task, 0).task for task in TASKS}
    assert asked == {task: task for task in TASKS}


@DATASETS
def test_short_captions_say_what_their_task_asks(arguments):
    data = Shapes(split="train", rich_fraction=0.0, **arguments)
    for index in range(300):
        scene, caption = data.scene(index), data.caption(index)
        assert caption == short_caption(scene)
        first, last = scene.objects[0], scene.objects[-1]
        plain = re.sub(r"\ban\b", "a", caption)
        assert plain == {
            "single_object": f"a {first.shape}",
            "two_object": f"a {first.shape} and a {last.shape}",
            "counting": f"{NUMBERS[len(scene.objects)]} {plural(first.shape)}",
            "colours": f"a {first.colour} {first.shape}",
            "position": f"a {first.colour} {first.shape} {scene.relation} "
            f"a {last.colour} {last.shape}",
            "colour_attribution": f"a {first.colour} {first.shape} and "
            f"a {last.colour} {last.shape}",
        }[scene.task]  # fmt: skip


@DATASETS
def test_rich_captions_name_all_there_is_to_see(arguments):
    data = Shapes(split="train", rich_fraction=1.0, **arguments)
    told_places = told_relations = 0
    for index in range(500):
        scene, caption = data.scene(index), data.caption(index)
        words = caption.split()
        assert len(words) <= MAX_WORDS
        named = scene.objects[:1] if scene.task == "counting" else scene.objects
        for thing in named:
            assert thing.colour in words
            assert thing.shape in words or plural(thing.shape) in words
            assert (thing.size in words) == (len(data.sizes) > 1)
        assert caption.endswith(f"on a {scene.background} background") == (
            len(data.backgrounds) > 1
        )
        relation = next((name for name in RELATIONS if f" {name} a" in caption), None)
        if relation:
            told_relations += 1
            assert in_relation(scene, relation)
        told_places += any(place in caption for place in (" top", " bottom", " center"))
        if relation is None and scene.task != "counting":
            assert_places_are_true(scene, caption, data.grid)
    assert told_places > 50 and told_relations > 50


def in_relation(scene: Scene, relation: str) -> bool:
    first, second = scene.objects
    direction = np.array(RELATIONS[relation])
    offset = np.array((first.x - second.x, first.y - second.y))
    along = offset @ direction
    return bool(along > np.abs(offset - along * direction).max())


def assert_places_are_true(scene: Scene, caption: str, grid: int) -> None:
    """Each half of "... and ..." that names a side of the image is about an object on it."""
    last = grid - 1
    for thing, phrase in zip(scene.objects, caption.split(" and "), strict=True):
        column, row = cell_of(thing, grid)
        sides = {"left": column == 0, "right": column == last, "top": row == 0,
                 "bottom": row == last}  # fmt: skip
        found = [side for side in sides if side in phrase.split()]
        assert all(sides[side] for side in found)
        if found:
            assert len(found) == sum(sides.values())


def test_the_position_task_is_true_and_every_relation_occurs():
    data = Shapes(split="train")
    scenes = [data.scene_for_task("position", index) for index in range(200)]
    assert all(scene.relation and in_relation(scene, scene.relation) for scene in scenes)
    assert set(Counter(scene.relation for scene in scenes)) == set(RELATIONS)


def test_tasks_come_as_often_as_their_weights_say():
    data = Shapes(split="train", task_weights={"counting": 3, "position": 1, "colours": 0})
    counts = Counter(data.scene(index).task for index in range(2000))
    assert counts.keys() == {"counting", "position"}
    assert counts["counting"] / 2000 == pytest.approx(0.75, abs=0.03)


def test_rich_fraction_changes_words_but_no_scene():
    short, rich = (Shapes(split="train", rich_fraction=share) for share in (0.0, 1.0))
    assert [short.scene(i) for i in range(100)] == [rich.scene(i) for i in range(100)]
    half = Shapes(split="train")
    is_short = [half.caption(i) == short.caption(i) for i in range(1000)]
    assert np.mean(is_short) == pytest.approx(0.5, abs=0.1)


def test_scenes_may_all_contain_one_shape():
    world = {"shapes": ["circle", "square", "star"], "held_out_fraction": 0}
    data = Shapes(**world, containing="star", samples=8)
    for task in TASKS:
        scenes = [data.scene_for_task(task, i) for i in range(40)]
        assert all(any(thing.shape == "star" for thing in scene.objects) for scene in scenes)
    others = {t.shape for i in range(200) for t in data.scene(i).objects} - {"star"}
    assert others == {"circle", "square"}
    assert {data.scene(index).task for index in range(8)} == set(TASKS)
    assert data.view("validation").containing == "star"
    assert data.identity().pop("containing") == "star"
    assert "containing" not in Shapes(**world).identity()  # caches of before stay valid
    with pytest.raises(UserError, match=r"containing='stra' must be one of .* Did you mean star"):
        Shapes(**world, containing="stra")


@DATASETS
def test_every_word_of_every_caption_is_known(arguments):
    for split in SPLITS:
        data = Shapes(split=split, **arguments)
        used = {word for index in range(1500) for word in data.caption(index).split()}
        assert used <= set(data.words)
    assert data.words == sorted(set(data.words))


@DATASETS
def test_objects_stay_apart_and_on_the_canvas(arguments):
    data = Shapes(split="train", **arguments)
    gap = 2 * MARGIN - 1e-6
    for scene in (data.scene(index) for index in range(1000)):
        for a, b in combinations(scene.objects, 2):
            distance = max(abs(a.x - b.x), abs(a.y - b.y))
            assert distance >= a.radius + b.radius + gap
        for thing in scene.objects:
            assert thing.radius + gap / 2 <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) <= 1 - thing.radius - gap / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_shapes_area_at_any_size_and_place(shape):
    area, _, _ = area_and_centroid(shape)
    for size, x, y in ((32, 0.5, 0.5), (32, 0.47, 0.61), (64, 0.31, 0.5), (96, 0.5, 0.55)):
        window = cover(shape, x, y, 0.2, size)
        assert window.coverage.sum() / size**2 == pytest.approx(area * 0.04, rel=0.05)


def test_a_larger_image_is_the_same_scene():
    small, large = (Shapes(split="train", image_size=size, **VARIED) for size in (32, 64))
    for index in range(50):
        assert small[index][1:] == large[index][1:]
        halved = large[index].image.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(halved - small[index].image).mean() < 1.0  # of 255; edges differ a little


def test_colours_and_background_are_drawn():
    data = Shapes(split="train", image_size=64, **VARIED)
    for index in range(50):
        image, _, scene = data[index]
        assert tuple(image[0, 0]) == COLOURS[scene.background]
        for thing in scene.objects:
            assert tuple(image[int(thing.y * 64), int(thing.x * 64)]) == COLOURS[thing.colour]


def test_a_batch_is_its_samples():
    data = Shapes(split="validation")
    images, texts, _ = data.batch([3, 0, 9])
    assert images.dtype == torch.uint8 and images.shape == (3, 32, 32, 3)
    for image, caption, index in zip(images, texts, (3, 0, 9), strict=True):
        assert np.array_equal(image.numpy(), data[index].image)
        assert caption == data[index].caption


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, "split='trian' must be one of .*Did you mean train"),
        ({"image_size": 48}, "image_size=48 must be a multiple of 32"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"shapes": ("circle", "sqare")}, "'sqare' must be one of .*Did you mean square"),
        ({"shapes": ("circle",)}, "must name at least two"),
        ({"colours": ("red", "red")}, "must not repeat"),
        ({"colours": ("red", "white")}, "backgrounds=.* must not share a colour"),
        ({"backgrounds": ()}, "backgrounds=.* must name at least one"),
        ({"sizes": {"huge": (0.2, 0.3)}}, r"sizes\['huge'\]=.* objects could touch"),
        ({"sizes": {"odd": (0.2, 0.1)}}, r"sizes\['odd'\]"),
        ({"grid": 3}, "objects could touch"),
        ({"grid": 1}, "'two_object' is impossible .* grid 1"),
        ({"jitter": 0.06}, "objects could touch"),
        ({"max_count": 5}, "max_count=5 must be from 1 to 4"),
        ({"max_count": 1}, "'counting' is impossible"),
        (
            {"task_weights": {"counting": -1}},
            r"task_weights\['counting'\]=-1 must be a finite number",
        ),
        ({"task_weights": {"counting": 0}}, "task_weights=.* must not all be zero"),
        ({"task_weights": {"count": 1}}, "Did you mean counting"),
        ({"rich_fraction": 1.5}, r"rich_fraction=1.5 must be a finite number of at least 0 and"),
        ({"held_out_fraction": 0.6}, "held_out_fraction=0.6"),
        ({"split": "held_out", "held_out_fraction": 0}, "is impossible in split 'held_out'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**{"split": "train", **arguments})


@pytest.mark.parametrize(
    "field",
    [
        *("image_size", "seed", "shapes", "colours", "sizes", "backgrounds", "grid", "jitter"),
        *("task_weights", "rich_fraction", "held_out_fraction", "samples"),
    ],
)
@pytest.mark.parametrize("value", ["x", None, -1, math.nan, math.inf, [[1]], True])
def test_arguments_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^{field}(\['\w+'\])?[ =].* must "):
        Shapes(split="train", **{field: value})


def test_bad_indices_and_tasks_are_refused():
    data = Shapes(split="train")
    with pytest.raises(ValueError, match="index -1"):
        data[-1]
    with pytest.raises(ValueError, match="Did you mean position"):
        data.scene_for_task("positions", 0)


def test_what_is_kept_gives_what_every_step_sees():
    data = Shapes(split="train")
    image, captions = data.cacheable(7)
    images, texts, _ = data.batch([7], step=3)
    assert np.array_equal(images[0], image) and image.shape[:2] == data.size_of(7)
    assert data.pick(captions, 7, 3) == texts[0]


def test_the_identity_tells_arguments():
    plain = Shapes(split="train").identity()
    assert plain == Shapes(split="train").identity()
    others = ({"seed": 1}, {"image_size": 64}, {"samples": 5}, {"rich_fraction": 0.0})
    assert all(Shapes(split="train", **other).identity() != plain for other in others)
    assert Shapes(split="validation").identity() != plain


def test_a_texture_takes_the_place_of_a_colour() -> None:
    data = Shapes(split="validation").with_word("striped")
    for i in range(20):
        scene = data.scene_for_task("position", i)
        assert any(thing.colour == "striped" for thing in scene.objects)
        assert "striped" in short_caption(scene)
        image = data.render(scene)
        for thing in (o for o in scene.objects if o.shape != "triangle"):  # it has a thin tip
            radius = 0.5 * thing.radius
            rows = slice(int((thing.y - radius) * 32), int((thing.y + radius) * 32))
            seen = {tuple(pixel) for pixel in image[rows, int(thing.x * 32)].tolist()}
            parts = TEXTURES.get(thing.colour, (thing.colour,))
            assert seen == {COLOURS[part] for part in parts}
    assert "striped" in vocabulary(textures=True) and "striped" not in vocabulary()


def test_a_texture_scales_with_the_image() -> None:
    scene = Shapes().with_word("striped").scene_for_task("colours", 0)
    small, large = (draw(scene.objects, scene.background, side) for side in (32, 64))
    thing = scene.objects[0]
    y, x = int(thing.y * 32), int(thing.x * 32)
    for dy in range(-3, 4):
        assert tuple(small[y + dy, x]) == tuple(large[2 * (y + dy), 2 * x])


def test_every_caption_of_an_image_is_true_of_it() -> None:
    data = Shapes(split="validation", every_caption=True)
    seen = set()
    for i in range(60):
        _, own = data.cacheable(i)
        texts = own["text"]
        assert short_caption(data.scene(i)) in texts
        assert len(set(texts)) == len(texts) > 1
        picked = {data.batch([i], step).captions[0] for step in range(40)}
        assert picked == set(texts)
        seen |= {len(texts)}
    assert data.batch([3], 7).captions == data.batch([2, 3], 7).captions[1:]
    assert max(seen) == 4
    assert "every_caption" not in Shapes().identity()
    assert data.view("train").every_caption


def test_true_captions_of_a_pair_name_its_relation() -> None:
    data = Shapes(every_caption=True, task_weights={"position": 1.0})
    for i in range(20):
        scene, texts = data.scene(i), data.cacheable(i)[1]["text"]
        assert short_caption(scene) in texts
        assert any(" and " in text for text in texts)


@pytest.mark.parametrize("word", ["star", "striped"])
def test_a_word_comes_in_every_colour_or_shape_in_turn(word) -> None:
    data = Shapes(seed=1).with_word(word)
    others = data.colours if word == "star" else data.shapes
    for i in range(12):
        kinds = {(o.shape, o.colour) for o in data.scene(i).objects}
        other = others[(i + 1) % len(others)]
        assert kinds & {(word, other), (other, word)}
