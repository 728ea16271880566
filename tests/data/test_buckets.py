import math

import numpy as np
import pytest
from PIL import Image

from mmdit.data.buckets import Buckets, fit, window

from .conftest import noise

SETS = pytest.mark.parametrize(
    ("image_size", "unit", "max_ratio"),
    [(32, 16, 4), (256, 16, 4), (512, 64, 2), (1024, 64, 4), (1024, 16, 2.5), (64, 16, 1)],
)


@SETS
def test_every_size_is_about_the_area_in_whole_units_and_within_the_ratio(
    image_size, unit, max_ratio
):
    sizes = Buckets(image_size=image_size, unit=unit, max_ratio=max_ratio).sizes
    assert (image_size, image_size) in sizes and len(set(sizes)) == len(sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % unit == 0 and width % unit == 0
        assert max(height, width) <= max_ratio * min(height, width)
        # Rounding the long side to a unit moves the area by at most half a unit of the short one.
        assert abs(height * width - image_size**2) <= min(height, width) * unit / 2


def test_a_ratio_of_one_leaves_the_square():
    assert Buckets(image_size=64, unit=16, max_ratio=1).sizes == ((64, 64),)


@SETS
def test_an_image_gets_the_nearest_log_ratio(image_size, unit, max_ratio):
    buckets = Buckets(image_size=image_size, unit=unit, max_ratio=max_ratio)
    sizes = np.random.default_rng(0).integers(1, 2000, (500, 2))
    for (height, width), found in zip(sizes, buckets.of(sizes), strict=True):
        distances = [abs(math.log(width / height) - math.log(w / h)) for h, w in buckets.sizes]
        assert distances[found] == pytest.approx(min(distances), abs=1e-12)
    assert list(buckets.of(buckets.sizes)) == list(range(len(buckets.sizes)))


@pytest.mark.parametrize("position", [0.0, 0.3, 0.5, 1.0])
def test_the_window_is_the_largest_of_its_shape_inside_the_image(position):
    rng = np.random.default_rng(1)
    for height, width, rows, columns in rng.integers(1, 3000, (300, 4)).tolist():
        left, top, right, bottom = window((height, width), (rows, columns), position)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert (right - left) / (bottom - top) == pytest.approx(columns / rows)
        assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
        assert left + top == pytest.approx(
            position * (height - (bottom - top)) + position * (width - (right - left)), abs=1e-6
        )


def test_fit_keeps_a_plain_image_unchanged():
    for height, width in ((9, 40), (40, 9), (1, 500), (700, 700)):
        plain = np.full((height, width, 3), (10, 128, 250), np.uint8)
        assert (fit(plain, (32, 48), 0.7) == (10, 128, 250)).all()


def test_fit_keeps_an_image_of_the_right_size_unchanged():
    image = noise(32, 48)
    assert np.array_equal(fit(image, (32, 48)), image)


def test_a_crop_without_scaling_is_a_slice():
    image = noise(32, 48)
    for position, left in ((0.0, 0), (0.5, 8), (1.0, 16)):
        assert np.array_equal(fit(image, (32, 32), position), image[:, left : left + 32])


def test_reduction_does_not_alias():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # above what 16 pixels can show: must become grey
    inner = fit(stripes, (16, 16))[2:-2, 2:-2].astype(float)
    assert np.abs(inner - 127.5).max() < 4


def test_an_extreme_aspect_ratio_needs_no_huge_image(monkeypatch):
    sides = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest, **options: (
            sides.append(max(size)),
            resize(self, size, *rest, **options),
        )[1],
    )
    assert fit(np.zeros((1, 60_000, 3), np.uint8), (512, 2048)).shape == (512, 2048, 3)
    assert max(sides) == 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 100}, "image_size=100 must be a multiple of unit 16"),
        ({"image_size": 0}, "image_size=0"),
        ({"unit": 0}, "unit=0 must be a whole number of at least 1"),
        ({"max_ratio": 0.5}, "max_ratio=0.5 must be a finite number of at least 1"),
        *(({name: "x"}, f"{name}='x' must be a") for name in ("image_size", "unit", "max_ratio")),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**{"image_size": 64, "unit": 16, "max_ratio": 4, **arguments})
