"""EMA, optimizer, schedule, precision, pictures."""

import math
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont

from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.plots import LOSSES, Curves, _wrapped, grid_image, plot, plot_losses, ticks
from mmdit.precision import autocast


def test_precision_is_what_was_asked_for() -> None:
    x = torch.randn(4, 4)
    with autocast(torch.device("cpu"), "bf16")():
        assert (x @ x).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32")():
        assert (x @ x).dtype == torch.float32
    with pytest.raises(UserError, match="fp8"):
        autocast(torch.device("cpu"), "fp8")
    with pytest.raises(UserError, match="device=nowhere"):
        available("nowhere")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 3), (-0.2, 1234.5), (1e-6, 2e-6)])
def test_ticks_cover_the_range_in_round_steps(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 12
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_grid_shows_every_image_in_its_place() -> None:
    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    images[1] = 200
    page = grid_image(images, ["a", "b " * 100, "日本 😀"], columns=2)
    assert page.getpixel((20, 20)) == (0, 0, 0)
    assert page.getpixel((160, 20)) == (200, 200, 200)


LONG = {
    "one word": "a" * 100_000,
    "Chinese": "\u6c49\u5b57" * 50_000,
    "Thai": "\u0e20\u0e32\u0e1e\u0e27\u0e32\u0e14\u0e17\u0e35\u0e48" * 11_000,
    "emoji": "\U0001f469\u200d\U0001f467\U0001f600" * 25_000,
    "accents": "e" + "\u0301" * 100_000,
    "Hebrew": "\u05e9\u05dc\u05d5\u05dd" * 25_000,
    "words": "word " * 20_000,
    "spaces": " " * 100_000,
    "line breaks": "\n" * 100_000,
    "escapes": "\x1b[2J" * 25_000,
    "bytes": "\udcff" * 100_000,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("side", [32, 512])
def test_a_caption_of_any_length_is_drawn_at_once(kind: str, side: int) -> None:
    images = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    began = time.process_time()
    grid_image(images, [LONG[kind]], side=side)
    assert time.process_time() - began < 1
    font = ImageFont.load_default(11)
    lines = _wrapped(LONG[kind], side, font)
    blank = kind in ("spaces", "line breaks")
    assert len(lines) == (0 if blank else 3)
    assert blank or lines[-1].endswith("…")
    assert all(font.getlength(line) <= side for line in lines)
    assert all(line.isprintable() or kind == "emoji" for line in lines)


def test_lines_break_at_spaces_and_inside_what_has_none() -> None:
    font = ImageFont.load_default(11)
    width = int(font.getlength("two words"))
    assert _wrapped("two words  and\nsix", width, font) == ["two words", "and six"]
    assert _wrapped("one\u6c49\u5b57", 128, font) == ["one\u6c49\u5b57"]
    parts = _wrapped("a " + "\u6c49" * 12, width, font)
    assert parts[0] == "a" and "".join(parts[1:]) == "\u6c49" * 12
    accented = _wrapped("e\u0301" * 12, width, font)
    assert all(not line.startswith("\u0301") for line in accented)


@pytest.mark.parametrize("curves", [{}, {"one": [(0, 1.0)]}, {"a": [(0, 1.0), (9, 2.0)]}])
def test_plot_is_drawn_whatever_there_is(tmp_path: Path, curves) -> None:
    plot(curves, tmp_path / "plot.png", x_label="step", y_label="loss")
    with Image.open(tmp_path / "plot.png") as page:
        assert page.size == (800, 480)
        assert (len(page.getcolors(1 << 20)) > 1) == bool(curves)


def curves_of(rows: Iterable[Mapping[str, Any]], **options: Any) -> Curves:
    curves = Curves(LOSSES, **options)
    for row in rows:
        curves.add(row)
    return curves


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, None, "1"])
def test_losses_that_are_not_finite_have_no_point(tmp_path: Path, number: float | None) -> None:
    rows = [{"step": i, "loss": 1 / (1 + i), "ema/psnr": 20.0 + i} for i in range(4)]
    plot_losses(curves_of(rows), tmp_path / "without.png")
    lost = {"step": 9, "loss": number, "ema/loss": number, "ema/psnr": number}
    plot_losses(curves_of([lost, *rows, lost]), tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_a_short_curve_is_kept_whole_and_a_long_one_by_its_extremes() -> None:
    rows = [{"step": i, "loss": math.sin(i)} for i in range(1, 5000)]
    rows[700]["loss"], rows[4321]["loss"] = 99.0, -99.0
    whole = [(row["step"], row["loss"]) for row in rows]
    for count in (1, 2, 7, 8, 9, 100, 4999):
        kept = curves_of(rows[:count], parts=8).points()["loss"]
        assert kept == sorted(set(kept)) and set(kept) <= set(whole[:count])
        assert len(kept) == count if count <= 8 else 8 <= len(kept) <= 17
        assert kept[-1] == whole[count - 1]
        for extreme in (min, max):
            height = extreme(y for _, y in whole[:count])
            assert extreme(y for _, y in kept) == height
    steps = [step for step, _ in curves_of(rows, parts=8).points()["loss"]]
    assert max(b - a for a, b in pairwise([0, *steps])) < 2 * 1024


def test_the_plot_of_a_long_run_takes_no_longer_than_that_of_a_short_one(tmp_path: Path) -> None:
    curves = curves_of({"step": i, "loss": 1 / i, "ema/loss": 2 / i} for i in range(1, 100_001))
    assert sum(map(len, curves.points().values())) < 10_000
    began = time.process_time()
    plot_losses(curves, tmp_path / "long.png")
    assert time.process_time() - began < 1
