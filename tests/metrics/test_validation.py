from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdit.flow.condition import Condition
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import LogitNormal
from mmdit.keys import generator_for
from mmdit.metrics.validation import LEVELS, validation_loss


class Counted(nn.Module):
    """A network that says how long the caption is, and keeps how many samples it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, z_t, t, c_vec, c_ctxt):
        self.sizes.append(len(z_t))
        return z_t * t[:, None, None, None] + c_vec[:, :, None, None]


def encode(captions):
    lengths = torch.tensor([[float(len(caption))] for caption in captions])
    return Condition(lengths, lengths[:, :, None])


@pytest.fixture
def pipeline() -> SimpleNamespace:
    return SimpleNamespace(
        mmdit=Counted(),
        text=SimpleNamespace(encode=encode),
        objective=Objective(
            path=RectifiedFlow(), timesteps=LogitNormal(), prediction=Velocity(), shift=Shift()
        ),
    )


LATENTS = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
CAPTIONS = ["a", "bb", "", "dddd", "eee"]


def test_the_loss_is_that_of_the_noise_of_every_sample(pipeline):
    noises = [torch.randn(2, 4, 4, generator=generator_for(3, "validation", i)) for i in range(5)]
    found = validation_loss(pipeline, LATENTS, CAPTIONS, seed=3)
    for t, loss in zip(LEVELS, found, strict=True):
        errors = []
        for x_0, epsilon, caption in zip(LATENTS, noises, CAPTIONS, strict=True):
            z_t = (1 - t) * x_0 + t * epsilon
            errors.append((z_t * t + len(caption) - (epsilon - x_0)).square().mean())
        assert loss == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_part_at_a_time_gives_the_same_loss(pipeline, batch_size):
    whole = validation_loss(pipeline, LATENTS, CAPTIONS, seed=0)
    assert set(pipeline.mmdit.sizes) == {5}
    pipeline.mmdit.sizes.clear()
    found = validation_loss(pipeline, LATENTS, CAPTIONS, seed=0, batch_size=batch_size)
    assert found == pytest.approx(whole, rel=1e-6)
    assert len(pipeline.mmdit.sizes) == len(LEVELS) * -(-5 // batch_size)
    assert max(pipeline.mmdit.sizes) == batch_size
