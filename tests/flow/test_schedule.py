import math

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.schedule import PublishedShift, Shift
from mmdit.registry import build, describe

INNER = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
each_shift = pytest.mark.each("shift")
each_alpha = pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, math.sqrt(2.0), 3.0, 6.7])


@each_shift
def test_log_snr_moves_by_the_same_everywhere(shift):
    log_snr = RectifiedFlow().log_snr
    moved = log_snr(shift(INNER)) - log_snr(INNER)
    torch.testing.assert_close(moved, moved[:1].expand_as(moved))


@each_alpha
def test_log_snr_moves_by_minus_two_log_alpha(alpha):
    log_snr = RectifiedFlow().log_snr
    moved = log_snr(Shift(alpha=alpha)(INNER)) - log_snr(INNER)
    torch.testing.assert_close(moved, torch.full_like(moved, -2 * math.log(alpha)))


@each_alpha
def test_one_over_alpha_undoes_alpha(alpha):
    torch.testing.assert_close(Shift(alpha=1 / alpha)(Shift(alpha=alpha)(INNER)), INNER)


@each_shift
def test_inverse_undoes_the_shift(shift):
    torch.testing.assert_close(shift.inverse(shift(INNER)), INNER)
    torch.testing.assert_close(shift(shift.inverse(INNER)), INNER)


@each_shift
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_grid_falls_from_exactly_one_to_exactly_zero(shift, steps):
    grid = shift.grid(steps)
    assert grid.shape == (steps + 1,)
    assert grid[0] == 1.0 and grid[-1] == 0.0
    assert (grid.diff() < 0).all()


def test_without_shift_the_grid_is_linear():
    grid = Shift(alpha=1.0).grid(4)
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_paper_value_at_1024_pixels():
    """Eq. 23: at alpha = 3 the middle of the path moves to t = 3/4, towards noise."""
    assert Shift(alpha=3.0)(torch.tensor([0.5])).item() == 0.75


@pytest.mark.parametrize("kind", [Shift, PublishedShift])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha, kind):
    with pytest.raises(UserError, match=f"{kind.__name__}: alpha={alpha} must be a finite number"):
        kind(alpha=alpha)


@each_shift
@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_needs_a_step(steps, shift):
    with pytest.raises(UserError, match=f"steps={steps} must be a whole number of at least 1"):
        shift.grid(steps)


@pytest.mark.parametrize("source", ["stability", "diffusers"])
def test_the_published_grid_is_that_of_the_reference_and_of_diffusers(golden, source):
    case = golden("sigmas")
    for alpha in case.config["shifts"]:
        for steps in case.config["steps"]:
            grid = PublishedShift(alpha=alpha).grid(steps)
            case.check(f"{source}.sigmas_shift{alpha}_steps{steps}", grid.float())
            exact = case.outputs[f"exact64.sigmas_shift{alpha}_steps{steps}"]
            torch.testing.assert_close(grid, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_the_published_grid_is_that_of_the_installed_diffusers(alpha, steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=alpha)
    theirs.set_timesteps(steps)
    grid = PublishedShift(alpha=alpha).grid(steps)
    assert grid[0] == 1.0 and grid[-1] == 0.0 and len(grid) == steps + 1
    torch.testing.assert_close(grid.float(), theirs.sigmas, rtol=0, atol=1e-6)


def test_the_published_shift_moves_single_times_as_any_other():
    assert torch.equal(PublishedShift(alpha=3.0)(INNER), Shift(alpha=3.0)(INNER))


def test_a_checkpoint_remembers_which_shift_it_was():
    description = describe(PublishedShift(alpha=3.0))
    assert description == {"class": "PublishedShift", "alpha": 3.0}
    assert type(build(description)) is PublishedShift
