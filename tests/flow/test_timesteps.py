import math

import pytest
import torch
from torch import Tensor

from mmdit.errors import UserError
from mmdit.flow.timesteps import (
    CosMap,
    DiscreteUniform,
    LogitNormal,
    Mode,
    TimestepDensity,
    Uniform,
)

each_density = pytest.mark.each("density")


def draw(density: TimestepDensity, n: int) -> Tensor:
    return density.sample(n, torch.Generator().manual_seed(0))


def midpoints(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@each_density
def test_pdf_integrates_to_one(density):
    # The loosest is mode(-1), whose pdf has integrable poles at both ends.
    assert density.pdf(midpoints(200_000)).double().mean() == pytest.approx(1.0, abs=1e-3)


def integral(density: TimestepDensity, t: Tensor) -> Tensor:
    """Of the pdf, from 0 to t."""
    cells = 200_000
    below = torch.cat([torch.zeros(1), density.pdf(midpoints(cells)).double().cumsum(0)])
    return below[(t * cells).round().long()] / cells


@each_density
def test_samples_follow_the_pdf(density):
    """Kolmogorov-Smirnov: the empirical distribution against the integral of the pdf."""
    n = 100_000
    t = draw(density, n).double().sort().values
    observed = (torch.arange(n) + 0.5) / n
    atom = t.unique(return_counts=True)[1].max().item() / n  # of discrete times, a whole step
    off = (integral(density, t) - observed).abs().max()
    assert off < atom + 1.95 / math.sqrt(n)  # exceeded once in a thousand


@each_density
def test_the_pdf_up_to_a_time_is_the_share_of_the_uniform_draws_that_map_there(density):
    u = midpoints(1000)
    t = density.from_uniform(u)
    share = u if t[-1] > t[0] else 1 - u
    atom = t.unique(return_counts=True)[1].max().item() / 1000
    # Mode(-1) is the loosest again.
    assert (integral(density, t) - share).abs().max() < atom + 1e-3


@each_density
def test_the_pdf_keeps_the_precision_of_the_times(density):
    assert density.pdf(midpoints(3)).dtype == torch.float64
    assert density.pdf(midpoints(3).float()).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_discrete_times_are_the_ends_of_equal_steps_and_equally_frequent(steps):
    n = 100_000
    numbers = draw(DiscreteUniform(steps=steps), n).double() * steps
    torch.testing.assert_close(numbers, numbers.round(), rtol=1e-6, atol=0)
    counts = numbers.round().long().bincount(minlength=steps + 1)
    assert len(counts) == steps + 1 and counts[0] == 0
    deviation = (counts[1:] - n / steps).square().sum().item() / (n / steps)  # chi squared
    assert deviation <= steps - 1 + 4 * math.sqrt(2 * steps)


@each_density
def test_pdf_is_the_change_of_variables_of_the_map(density):
    """Where autograd knows the slope of the map; that of discrete times is 0 between its jumps."""
    u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64, requires_grad=True)
    t = density.from_uniform(u)
    (slope,) = torch.autograd.grad((t + 0 * u).sum(), u)
    covered = density.pdf(t.detach()).double() * slope.abs()
    torch.testing.assert_close(covered[slope != 0], torch.ones_like(u)[slope != 0])


@pytest.mark.parametrize(
    ("density", "mean"),
    [
        (LogitNormal(m=1.0, s=1.0), 0.697),  # positive m favours noise: trap 1 gives 0.303
        (LogitNormal(m=-1.0, s=1.0), 0.303),
        (LogitNormal(m=0.0, s=1.0), 0.5),
        (CosMap(), 0.5),  # trap 2 gives 0.648
        (Mode(s=0.0), 0.5),
        (Mode(s=1.29), 0.5),
        (Uniform(), 0.5),
    ],
)
def test_mean_time(density, mean):
    # Of 1e5 draws the mean strays by 0.0009 (uniform), or less.
    assert draw(density, 100_000).mean().item() == pytest.approx(mean, abs=0.005)


def test_logit_of_a_logit_normal_time_is_normal():
    u = torch.logit(draw(LogitNormal(m=0.5, s=0.6), 40_000).double())
    assert u.mean().item() == pytest.approx(0.5, abs=0.012)
    assert u.std().item() == pytest.approx(0.6, abs=0.01)


def test_mode_zero_is_uniform():
    t = midpoints(100)
    torch.testing.assert_close(Mode(s=0.0).pdf(t).double(), torch.ones_like(t))
    torch.testing.assert_close(Mode(s=0.0).from_uniform(t), 1 - t)


def test_mode_favours_the_middle_when_positive_and_the_ends_when_negative():
    middle = torch.tensor([0.5])
    assert Mode(s=1.0).pdf(middle) > 1 > Mode(s=-1.0).pdf(middle)


def test_paper_values_of_the_pdfs():
    """Sec. 3.1, evaluated by hand at t = 1/2 and t = 1/4."""
    half, quarter = torch.tensor([0.5]), torch.tensor([0.25])
    assert LogitNormal().pdf(half).item() == pytest.approx(4 / math.sqrt(2 * math.pi))
    assert CosMap().pdf(half).item() == pytest.approx(4 / math.pi)
    assert CosMap().pdf(quarter).item() == pytest.approx(2 / (math.pi * 0.625))


def test_cosmap_has_the_noise_levels_of_the_cosine_path():
    """Sec. 3.1: t / (1 - t) = tan(pi u / 2), which is b / a of that path at time u."""
    u = midpoints(1000)
    t = CosMap().from_uniform(u)
    torch.testing.assert_close(t / (1 - t), torch.tan(math.pi * u / 2))


@each_density
def test_times_stay_inside_the_unit_interval(density):
    t = draw(density, 20_000)
    assert t.dtype == torch.float32 and t.shape == (20_000,)
    assert (t > 0).all() and (t <= 1).all()  # float32 rounds the nearest to noise to 1
    extremes = density.from_uniform(torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64))
    assert (extremes >= 0).all() and (extremes <= 1).all()


@each_density
def test_the_map_is_monotone_so_that_one_keyed_draw_serves_all(density):
    steps = density.from_uniform(midpoints(10_000)).diff()
    assert (steps >= 0).all() or (steps <= 0).all()


@each_density
def test_draws_are_decided_by_the_generator_alone(density):
    first = draw(density, 5)
    torch.manual_seed(1)
    assert torch.equal(draw(density, 5), first)
    assert first.unique().numel() > 1


@pytest.mark.parametrize("m", [float("nan"), -float("inf")])
def test_a_logit_normal_needs_a_finite_place(m):
    with pytest.raises(UserError, match=f"LogitNormal: m {m} must be finite"):
        LogitNormal(m=m)


@pytest.mark.parametrize("s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_logit_normal_needs_a_positive_scale(s):
    with pytest.raises(UserError, match=rf"LogitNormal: s={s} must be a finite number above 0"):
        LogitNormal(s=s)


@pytest.mark.parametrize("steps", [0, -1])
def test_discrete_times_need_a_step(steps):
    with pytest.raises(UserError, match=f"DiscreteUniform: steps={steps} must be a whole number"):
        DiscreteUniform(steps=steps)


@pytest.mark.parametrize("s", [-1.01, 1.752, 1.76, float("nan")])  # 2 / (pi - 2) = 1.7519...
def test_mode_refuses_a_map_that_is_not_monotone(s):
    with pytest.raises(UserError, match=rf"Mode: s {s} must lie in"):
        Mode(s=s)


@pytest.mark.parametrize("s", [-1.0, 1.75, Mode.LARGEST])
def test_mode_is_monotone_up_to_the_bounds_of_the_paper(s):
    assert (Mode(s=s).from_uniform(midpoints(10_000)).diff() < 0).all()
