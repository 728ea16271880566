"""EMA, optimizer, schedule, precision, pictures."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdit.engine.pictures import grid_image, plot, plot_losses, ticks
from mmdit.engine.precision import autocast, chosen_device
from mmdit.errors import UserError


def test_precision_is_what_was_asked_for() -> None:
    x = torch.randn(4, 4)
    with autocast(torch.device("cpu"), "bf16")():
        assert (x @ x).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32")():
        assert (x @ x).dtype == torch.float32
    with pytest.raises(UserError, match="fp8"):
        autocast(torch.device("cpu"), "fp8")
    with pytest.raises(UserError, match="device=nowhere"):
        chosen_device("nowhere")


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


@pytest.mark.parametrize("curves", [{}, {"one": [(0, 1.0)]}, {"a": [(0, 1.0), (9, 2.0)]}])
def test_plot_is_drawn_whatever_there_is(tmp_path: Path, curves) -> None:
    plot(curves, tmp_path / "plot.png", x_label="step", y_label="loss")
    with Image.open(tmp_path / "plot.png") as page:
        assert page.size == (800, 480)
        assert (len(page.getcolors(1 << 20)) > 1) == bool(curves)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, None])
def test_losses_that_are_not_finite_have_no_point(tmp_path: Path, number: float | None) -> None:
    rows = [{"step": i, "loss": 1 / (1 + i), "ema/psnr": 20.0 + i} for i in range(4)]
    plot_losses(rows, tmp_path / "without.png")
    lost = {"step": 9, "loss": number, "ema/loss": number, "ema/psnr": number}
    plot_losses([lost, *rows, lost], tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()
