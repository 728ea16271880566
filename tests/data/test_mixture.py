"""Mixtures: shares that hold exactly, orders that follow from positions, sources that agree."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdit.data import Batch, Constant, Mixture, Shapes, image_folder
from mmdit.errors import UserError
from tests.training_for_tests import losses, run

OLD = Shapes(samples=40, seed=1)


@pytest.fixture
def new(photo, tmp_path: Path) -> Any:
    """A function that opens three photos with one caption."""
    for i in range(3):
        photo(tmp_path / "photos" / f"{i}.png", None, height=40, width=50 + i, seed=i)

    def opened(**options: Any) -> Any:
        given = {"image_size": 32, "max_ratio": 1, "crop": "centre", "validation_fraction": None}
        caption = Constant(caption="a photo of sks dog")
        return image_folder(root=str(tmp_path / "photos"), captions=caption, **(given | options))

    return opened


def mixed(new: Any, old_share: float = 0.7, new_share: float = 0.3, **options: Any) -> Mixture:
    shares = {"old": old_share, "new": new_share}
    return Mixture(parts={"old": OLD, "new": new(**options)}, shares=shares)


def test_shares_hold_in_every_block(new) -> None:
    data = mixed(new)
    indices = data.order(batch_size=4, seed=0)(0, 1000)
    parts = [data.place(index).part for index in indices]
    for start in range(0, 1000, 10):
        assert Counter(parts[start : start + 10]) == {"old": 7, "new": 3}
    assert len({tuple(parts[start : start + 10]) for start in range(0, 1000, 10)}) > 20


def test_halves_fill_every_batch_alike(new) -> None:
    data = mixed(new, 1, 1)
    order = data.order(batch_size=4, seed=0)
    for start in range(0, 400, 4):
        parts = Counter(data.place(index).part for index in order(start, 4))
        assert parts == {"old": 2, "new": 2}


def test_shares_hold_in_a_mixture_that_is_part_of_another(new) -> None:
    inner = mixed(new, 0, 1)
    data = Mixture(parts={"instance": inner, "class": OLD}, shares={"instance": 1, "class": 1})
    indices = data.order(batch_size=4, seed=0)(0, 400)
    places = [data.place(index) for index in indices]
    assert Counter(place.part for place in places) == {"instance": 200, "class": 200}
    taught = [inner.place(place.number).part for place in places if place.part == "instance"]
    assert Counter(taught) == {"new": 200}
    assert len(set(indices)) == 400


def test_the_order_follows_from_the_position_alone(new) -> None:
    data = mixed(new)
    whole = data.order(batch_size=4, seed=3)(0, 300)
    resumed = data.order(batch_size=100, seed=3)
    for start, count in ((250, 50), (0, 7), (123, 31), (7, 1)):
        assert resumed(start, count) == whole[start : start + count]
    assert data.order(batch_size=4, seed=4)(0, 300) != whole


def test_each_part_keeps_its_own_order(new) -> None:
    data = mixed(new)
    places = [data.place(index) for index in data.order(batch_size=4, seed=5)(0, 1000)]
    for name, part in data.parts.items():
        seen = [place.number for place in places if place.part == name]
        assert seen == part.order(batch_size=1, seed=5)(0, len(seen))


def test_a_sample_seen_again_has_an_index_of_its_own(new) -> None:
    """Noise is keyed by the index: one photo, many times in a batch, gets many noises."""
    data = mixed(new, 0.1, 0.9)
    indices = data.order(batch_size=4, seed=0)(0, 500)
    assert len(set(indices)) == len(indices)
    assert {index % len(data) for index in indices} == set(range(len(data)))


def test_a_sample_is_that_of_its_part(new) -> None:
    data = mixed(new)
    photos = data.parts["new"]
    assert len(data) == 43
    assert data.kinds == ("text",)
    batch = data.batch([2, 41, 41 + 2 * 43])
    assert batch.images.shape == (3, 32, 32, 3)
    assert batch.captions == [OLD.caption(2), "a photo of sks dog", "a photo of sks dog"]
    assert torch.equal(batch.images[1:2], photos.batch([1]).images)
    image, captions = data.cacheable(42)
    assert np.array_equal(image, photos.cacheable(2)[0])
    assert captions == {"text": ("a photo of sks dog",)}
    assert pickle.loads(pickle.dumps(data)).batch([41]).captions == ["a photo of sks dog"]


def test_validation_is_that_of_the_first_part(new) -> None:
    data = mixed(new).view("validation")
    assert torch.equal(data.square([0, 1]).images, OLD.view("validation").square([0, 1]).images)
    assert data.prompts() == OLD.view("validation").prompts()
    one = Mixture(parts={"new": new()}, shares={"new": 1}).view("validation")
    assert len(one) == 3
    assert one.square([0]).captions == ["a photo of sks dog"]
    assert one.prompts() == []


def test_it_is_identified_by_its_parts(new) -> None:
    one, other = mixed(new), mixed(new, 0.5, 0.5)
    assert one.identity() == other.identity()
    assert one.fingerprint() == {"old": {}, "new": new().fingerprint()}
    shapes = Mixture(parts={"a": OLD, "b": Shapes(seed=2)}, shares={"a": 1, "b": 1})
    assert shapes.fingerprint() == {}
    assert shapes.identity() != one.identity()


class Masked(Shapes):
    """Shapes with a mask beside each image."""

    def batch(self, indices, step: int = 0) -> Batch:
        images, captions, _ = super().batch(indices, step)
        return Batch(images, captions, {"mask": torch.ones(len(images), 1)})


def test_what_else_comes_with_an_image_is_kept() -> None:
    parts = {"a": Masked(samples=4), "b": Masked(samples=4, seed=1)}
    data = Mixture(parts=parts, shares={"a": 1, "b": 1})
    assert data.batch([0, 5]).extra["mask"].shape == (2, 1)
    data = Mixture(parts=parts | {"b": OLD}, shares={"a": 1, "b": 1})
    with pytest.raises(UserError, match="must be alike in all parts"):
        data.batch([0, 5])


def test_a_share_of_zero_is_validated_on_but_not_trained_on(new) -> None:
    data = mixed(new, 0, 1)
    places = [data.place(i).part for i in data.order(batch_size=4, seed=0)(0, 50)]
    assert set(places) == {"new"}
    assert data.view("validation").prompts() == OLD.view("validation").prompts()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((-1, 1), r"data\.shares\.old=-1 must be a finite number of at least 0"),
        ((0, 0), "must not all be 0"),
        ((float("nan"), 1), "at least 0"),
        ((True, 1), "at least 0"),
        (("half", 1), "at least 0"),
        ((1e-5, 1), "must be 0 or at least 0.001"),
        ((0.997, 0.71234567), "must be simple numbers"),
    ],
)
def test_bad_shares_are_refused(new, shares, message) -> None:
    with pytest.raises(UserError, match=message):
        mixed(new, *shares)


def test_parts_that_do_not_fit_are_refused(new) -> None:
    with pytest.raises(UserError, match="at least one data set"):
        Mixture(parts={}, shares={})
    with pytest.raises(UserError, match=r"must name the parts \['old'\]"):
        Mixture(parts={"old": OLD}, shares={"older": 1})
    with pytest.raises(UserError, match=r"old has 32 x 32 and new has 64 x 64 pixels"):
        mixed(new, image_size=64)

    class Empty(Shapes):
        def __len__(self) -> int:
            return 0

    with pytest.raises(UserError, match=r"data\.parts\.new=.* is empty"):
        Mixture(parts={"old": OLD, "new": Empty()}, shares={"old": 1, "new": 1})


def test_a_part_that_changes_cannot_be_cached(new) -> None:
    data = mixed(new, crop="random")
    assert data.batch([0, 40]).images.shape == (2, 32, 32, 3)
    with pytest.raises(UserError, match=r"part new of the mixture: data\.crop=random"):
        data.cacheable(0)
    with pytest.raises(UserError, match="part new of the mixture"):
        data.identity()


def test_an_empty_caption_is_refused() -> None:
    with pytest.raises(UserError, match="must not be empty"):
        Constant(caption=" ")
    with pytest.raises(UserError, match="mix synthetic must be text"):
        Constant(caption="a dog").open(Path("."), ["synthetic"])


MIXTURE = (
    *("experiment=smoke", "precision=fp32", "data=mixture", "~data.samples"),
    *("data.parts.old.samples=32", "data.parts.new.root=photos"),
    *("data/captions@data.parts.new.captions=constant", "data.parts.new.captions.caption=a star"),
)


def photographed(photo, folder: Path) -> None:
    for i in range(3):
        photo(folder / "photos" / f"{i}.png", None, height=40, width=50 + i, seed=i)


@pytest.mark.slow
def test_all_sources_batches_and_processes_give_the_same_losses(photo, tmp_path: Path) -> None:
    photographed(photo, tmp_path)
    for name in ("pixels", "memory", "cache"):
        run(tmp_path, "train.py", *MIXTURE, f"latents=from_{name}", f"run=runs/{name}")
    run(tmp_path, "train.py", *MIXTURE, "run=runs/two", "parallel=ddp", processes=2)
    memory = losses(tmp_path / "runs" / "memory")
    assert len(memory) == 6
    for name in ("pixels", "cache", "two"):
        assert losses(tmp_path / "runs" / name) == pytest.approx(memory, abs=1e-5)


@pytest.mark.slow
def test_two_halves_equal_an_unbroken_run_wherever_the_photos_are(photo, tmp_path: Path) -> None:
    photographed(photo, tmp_path)
    run(tmp_path, "train.py", *MIXTURE, "run=runs/whole")
    run(tmp_path, "train.py", *MIXTURE, "run=runs/parts", "training.steps=3")
    (tmp_path / "photos").rename(tmp_path / "moved")
    words = (*MIXTURE, "resume=runs/parts", "data.parts.new.root=moved")
    run(tmp_path, "train.py", *words)
    assert losses(tmp_path / "runs" / "parts") == losses(tmp_path / "runs" / "whole")
    for i in range(3):  # one of which is held back
        photo(tmp_path / "moved" / f"{i}.png", None, height=40, width=50 + i, seed=9 + i)
    result = run(tmp_path, "train.py", *words, "training.steps=8", code=2)
    assert "data.found.new.content" in result.stderr
