import math
from functools import partial

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.grids import CosineGrid, Grid, KarrasGrid, LDMGrid, UniformGrid, squeezed
from mmdit.flow.paths import EDM, Cosine, LDMLinear, RectifiedFlow
from mmdit.flow.schedule import PublishedShift, Shift

STRAIGHT = RectifiedFlow()
each_grid = pytest.mark.each("grid")
each_shift = pytest.mark.each("shift")
shifts_once = pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])


@each_grid
@each_shift
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_a_grid_falls_strictly_to_exactly_zero(grid, shift, steps):
    times = grid(steps, shift, STRAIGHT)
    assert times.shape == (steps + 1,) and times.dtype == torch.float64
    assert times[0] <= 1.0 and times[-1] == 0.0
    assert (times.diff() < 0).all()


@each_grid
def test_a_grid_starts_in_noise_and_takes_steps_of_its_own(grid):
    times = grid(20, Shift(), STRAIGHT)
    assert times[0] >= 0.9
    assert -times.diff().max() > 0 and -times.diff().min() < 0.5


@each_grid
@shifts_once
def test_a_shift_moves_log_snr_by_minus_two_log_alpha(grid, alpha):
    log_snr = RectifiedFlow().log_snr
    plain, moved = (grid(20, Shift(alpha=a), STRAIGHT)[1:-1] for a in (1.0, alpha))
    expected = torch.full_like(plain, -2 * math.log(alpha))
    torch.testing.assert_close(log_snr(moved) - log_snr(plain), expected)


@each_grid
@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_needs_a_step(grid, steps):
    for ask in (grid, partial(grid.remaining, strength=0.5)):
        with pytest.raises(UserError, match=f"steps={steps} must be a whole number of at least 1"):
            ask(steps, Shift(), STRAIGHT)


@each_shift
def test_the_uniform_grid_is_that_of_its_shift(shift):
    assert torch.equal(UniformGrid()(9, shift, STRAIGHT), shift.grid(9))


@pytest.mark.parametrize("path", [Cosine(), Cosine(last=0.9), RectifiedFlow()], ids=type)
def test_the_cosine_grid_takes_equal_steps_of_the_angle_from_the_start_of_the_path(path):
    cosine = path if isinstance(path, Cosine) else Cosine()
    grid = CosineGrid()(7, Shift(), path)[:-1]
    angles = torch.atan(grid / (1 - grid)) * 2 / math.pi
    expected = torch.linspace(cosine.last, 0.0, 8, dtype=torch.float64)[:-1]
    torch.testing.assert_close(angles, expected)
    assert grid[0].item() == cosine.noisiest


OTHER_BETAS = LDMLinear(beta_start=1e-4, beta_end=0.02)


@pytest.mark.parametrize("path", [LDMLinear(), OTHER_BETAS, RectifiedFlow()], ids=type)
def test_the_grid_of_latent_diffusion_takes_equal_steps_of_the_timesteps_of_the_path(path):
    linear = path if isinstance(path, LDMLinear) else LDMLinear()
    grid = LDMGrid()(7, Shift(), path)
    timesteps = linear.time_at(grid)
    torch.testing.assert_close(timesteps, torch.linspace(1.0, 0.0, 8, dtype=torch.float64))
    assert grid[0].item() == linear.noisiest


def test_other_betas_start_at_another_noise_level():
    assert OTHER_BETAS.noisiest - LDMLinear().noisiest > 0.03


def test_the_grid_of_karras_is_equation_5():
    """Karras et al. 2022: sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho."""
    n, rho = 6, 7.0
    grid = KarrasGrid()(n, Shift(), STRAIGHT)[:-1]
    expected = [
        (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
        for i in range(n)
    ]
    assert (grid / (1 - grid)).tolist() == pytest.approx(expected)
    assert expected[0] == pytest.approx(80.0) and expected[-1] == pytest.approx(0.002)


def test_the_grid_of_karras_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    theirs.set_timesteps(11)
    grid = KarrasGrid()(11, Shift(), STRAIGHT)
    torch.testing.assert_close((grid / (1 - grid)).float(), theirs.sigmas, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_min": 80.0}, "sigma_min 80.0 and sigma_max 80.0 must satisfy 0 < sigma_min <"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min 2.0 and sigma_max 1.0"),
        ({"sigma_min": 0.0}, "sigma_min 0.0"),
        ({"sigma_min": -1.0}, "sigma_min -1.0"),
        ({"rho": 0.0}, "rho=0.0 must be a finite number above 0"),
        ({"rho": -7.0}, "rho=-7.0 must be a finite number above 0"),
        ({"rho": float("nan")}, "rho=nan must be a finite number above 0"),
        ({"sigma_max": float("inf")}, "sigma_max inf must satisfy"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(UserError, match=f"KarrasGrid: .*{message}"):
        KarrasGrid(**arguments)


def test_what_remains_is_the_end_of_the_grid(golden):
    """Start indices of the reference; at some of them diffusers starts one step later."""
    table = golden("img2img").config["table"]
    assert any(row["stability_start"] != row["diffusers_start"] for row in table)
    for row in table:
        shift = PublishedShift(alpha=row["shift"])
        remaining = UniformGrid().remaining(row["steps"], shift, STRAIGHT, strength=row["denoise"])
        assert torch.equal(remaining, shift.grid(row["steps"])[row["stability_start"] :])


@each_grid
@each_shift
def test_all_remains_at_strength_one_and_nothing_but_data_at_zero(grid: Grid, shift):
    assert torch.equal(grid.remaining(7, shift, STRAIGHT, strength=1.0), grid(7, shift, STRAIGHT))
    assert grid.remaining(7, shift, STRAIGHT, strength=0.0).tolist() == [0.0]


@each_grid
@pytest.mark.parametrize("strength", [-0.1, 1.1, 2.0, float("nan")])
def test_more_than_all_and_less_than_nothing_cannot_remain(grid, strength):
    """A negative index would count from the end of the grid."""
    with pytest.raises(UserError, match=rf"strength {strength} must lie in \[0, 1\]"):
        grid.remaining(7, Shift(), STRAIGHT, strength=strength)


@each_grid
@pytest.mark.parametrize("path", [Cosine(last=0.2), EDM(sigma_max=9.0)], ids=type)
def test_what_remains_is_the_end_of_the_whole_also_where_that_is_squeezed(grid, path):
    whole = squeezed(grid(10, Shift(alpha=3.0), path), noisiest=path.noisiest)
    rest = grid.remaining(10, Shift(alpha=3.0), path, strength=0.5)
    assert torch.equal(rest, whole[5:])
    assert whole[0].item() <= path.noisiest


def test_squeezed_scales_a_grid_that_starts_at_too_much_noise_and_no_other():
    grid = torch.tensor([0.8, 0.6, 0.2, 0.0], dtype=torch.float64)
    scaled = squeezed(grid, noisiest=0.4)
    torch.testing.assert_close(scaled, grid / 2)
    assert scaled[0] == 0.4 and scaled[-1] == 0.0
    for enough in (0.8, 0.9, 1.0):
        assert torch.equal(squeezed(grid, noisiest=enough), grid)
