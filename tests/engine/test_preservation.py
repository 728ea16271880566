"""Prior preservation without class images: targets are what the model predicts by itself."""

from pathlib import Path

import pytest
import torch

import mmdit
from mmdit.adapters import lora
from mmdit.engine.preservation import OwnPrediction, adapters_off
from mmdit.errors import UserError
from mmdit.flow.objective import Draw
from mmdit.keys import generator_for


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    pipe = mmdit.load_pipeline(tiny_published)
    pipe.requires_grad_(False)
    pipe.load_lora(lora(pipe, rank=2, parts=["mmdit", "clip_l"]), name="adapter")
    return pipe


def batch(pipe: mmdit.Pipeline, n: int = 4) -> tuple[torch.Tensor, Draw, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, pipe.mmdit.latent_channels, 8, 8)
    x_0, epsilon = (torch.randn(shape, generator=generator) for _ in range(2))
    return x_0, Draw(torch.linspace(0.2, 0.8, n), epsilon), torch.ones(n, 3, dtype=torch.bool)


@torch.no_grad()
def move(pipe: mmdit.Pipeline) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, weight in pipe.named_parameters():
        if ".changes." in name:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


def test_a_new_adapter_loses_nothing_on_the_class(pipe) -> None:
    prior = OwnPrediction(prompt="a dog", share=0.5)
    x_0, draw, kept = batch(pipe)
    own = pipe.encode(["a zork dog"] * 4)
    chosen = torch.tensor([True, False, True, False])
    losses = prior.loss(pipe, x_0, own, draw, chosen, kept)
    assert losses[chosen].max() < 1e-9 < losses[~chosen].min()
    plain = pipe.objective(pipe.mmdit, x_0, own, draw)
    assert torch.allclose(losses[~chosen], plain[~chosen], rtol=1e-5)


def test_the_target_is_the_prediction_without_the_adapter(pipe) -> None:
    prior = OwnPrediction(prompt="a dog")
    x_0, draw, kept = batch(pipe)
    kept[1, 0] = False  # an encoder that is dropped is dropped for both
    chosen = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        known = pipe.text(pipe.text.tokenize(["a dog"] * 4), kept)
        target = pipe.objective.predict(pipe.mmdit, x_0, known, draw)
    move(pipe)
    changed = pipe.text(pipe.text.tokenize(["a dog"] * 4), kept)
    output = pipe.objective.predict(pipe.mmdit, x_0, changed, draw)
    expected = (output - target).square().flatten(1).mean(1)
    losses = prior.loss(pipe, x_0, pipe.encode(["a zork dog"] * 4), draw, chosen, kept)
    assert (expected > 0).all() and torch.allclose(losses, expected, rtol=1e-4)
    losses.sum().backward()
    moved = {name for name, weight in pipe.named_parameters() if weight.grad is not None}
    assert moved and all(".changes.adapter." in name for name in moved)


def test_the_draw_follows_the_sample(pipe) -> None:
    prior = OwnPrediction(prompt="a dog", share=0.3)
    draws = prior.draw([generator_for("x", i) for i in range(2000)])
    assert abs(draws.float().mean().item() - 0.3) < 0.04
    assert torch.equal(draws[5:9], prior.draw([generator_for("x", i) for i in range(5, 9)]))


def test_adapters_come_back_after_an_error(pipe) -> None:
    pipe.lora_scale("adapter", 0.7)
    with pytest.raises(ValueError, match="oh"), adapters_off(pipe):
        assert pipe.adapters == {"adapter": 0}
        raise ValueError("oh")
    assert pipe.adapters == {"adapter": 0.7}
    pipe.unload_lora()
    with (
        pytest.raises(UserError, match="none changes a layer: choose adapter=lora"),
        adapters_off(pipe),
    ):
        pass


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan"), "half"])
def test_bad_shares_are_refused(share) -> None:
    with pytest.raises(UserError, match=r"prior\.share="):
        OwnPrediction(prompt="a dog", share=share)
