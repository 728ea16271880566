"""EMA, optimizer, schedule, precision, pictures."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from mmdit.engine.ema import EMA
from mmdit.engine.optimizers import WarmupConstant, adamw
from mmdit.engine.pictures import grid_image, plot, ticks
from mmdit.engine.precision import autocast, chosen_device
from mmdit.errors import UserError
from mmdit.models.clip import CLIPTextModel


def test_average_of_bfloat16_weights_is_float32_and_moves() -> None:
    module = nn.Linear(4, 4).to(torch.bfloat16)
    ema = EMA(module, decay=0.9999, every=1)
    assert all(average.dtype == torch.float32 for average in ema.module.parameters())
    before = ema.module.weight.clone()
    with torch.no_grad():
        module.weight += 1
    for step in range(1, 4):
        ema.update(step)
    assert (ema.module.weight > before).all()


def test_average_converges_to_constant_weights_at_its_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, decay=0.5, every=2)
    with torch.no_grad():
        ema.module.weight.zero_()
        module.weight.fill_(1.0)
    expected = 0.0
    for step in range(1, 41):
        ema.update(step)
        if step % 2 == 0:
            decay = min(0.5, (1 + step // 2) / (10 + step // 2))
            expected = decay * expected + (1 - decay)
        assert ema.module.weight.item() == pytest.approx(expected)
    assert expected == pytest.approx(1.0, abs=1e-5)


def test_average_follows_neither_frozen_weights_nor_buffers() -> None:
    module = nn.BatchNorm1d(2)
    module.weight.requires_grad_(False)
    ema = EMA(module, decay=0.5, every=1)
    with torch.no_grad():
        for value in (module.weight, module.bias, module.running_mean):
            value += 1
    ema.update(1)
    assert torch.equal(ema.module.weight, torch.ones(2))
    assert torch.equal(ema.module.running_mean, torch.zeros(2))
    assert (ema.module.bias > 0).all()


def test_decay_is_for_matrices() -> None:
    model = CLIPTextModel(vocabulary_size=8, width=4, depth=2, num_heads=1, length=3)
    decayed, others = adamw(model, lr=0.1, weight_decay=0.5).param_groups
    assert decayed["weight_decay"] == 0.5
    assert others["weight_decay"] == 0.0
    assert all(weight.ndim == 2 for weight in decayed["params"])
    assert any(weight is model.token_embedding.weight for weight in others["params"])
    assert sum(len(g["params"]) for g in (decayed, others)) == len(list(model.parameters()))


def test_warm_up_is_linear_then_constant() -> None:
    schedule = WarmupConstant(warmup_steps=4)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert WarmupConstant(warmup_steps=0)(0) == 1.0


@pytest.mark.parametrize("make", [lambda: WarmupConstant(warmup_steps=-1)])
def test_bad_numbers_are_refused(make) -> None:
    with pytest.raises(UserError, match="-1"):
        make()
    for decay, every in ((1.0, 1), (-0.1, 1), (0.9, 0)):
        with pytest.raises(UserError, match=r"ema\."):
            EMA(nn.Linear(1, 1), decay=decay, every=every)


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
