import math

import pytest
import torch
from torch import Tensor

from mmdit.errors import UserError
from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import (
    dpmpp_2m,
    dpmpp_2m_log_snr,
    euler,
    euler_ancestral,
    heun,
    midpoint,
)

ONE_STEP = [euler, heun, midpoint]
TWO_STEP = [dpmpp_2m, dpmpp_2m_log_snr]


def each(solvers):
    return pytest.mark.parametrize("known", solvers, ids=lambda solver: solver.__name__)


each_solver = pytest.mark.each("solver")


class Counted:
    """A velocity function that remembers the times it was asked for."""

    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, z: Tensor, t: float) -> Tensor:
        self.times.append(t)
        return self.velocity(z, t)


def growth(z: Tensor, t: float) -> Tensor:
    """dz/dt = (1 + t) z, so that z(0) = z(1) exp(-3/2)."""
    return (1 + t) * z


def draws_noise(solver) -> bool:
    """Whether it does more than to follow the velocity: a little of the start then changes all."""
    z = torch.ones(1, 9, dtype=torch.float64)
    reached, beside = (solver(growth, z + step, Shift().grid(8)) for step in (0.0, 1e-5))
    return bool((reached - beside).abs().max() > 1e-2)


@each_solver
@pytest.mark.parametrize("steps", [1, 5])
def test_straight_paths_are_followed_exactly(solver, steps):
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    if not draws_noise(solver):
        reached = solver(lambda z, t: epsilon - x_0, epsilon, Shift(alpha=3.0).grid(steps))
        torch.testing.assert_close(reached, x_0)


@each_solver
def test_the_start_decides_all_and_each_image_alone(solver):
    z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    together = solver(growth, z, Shift().grid(5))
    for i in (2, 0, 1):
        torch.testing.assert_close(solver(growth, z[i : i + 1], Shift().grid(5))[0], together[i])


@each_solver
def test_more_steps_come_closer_by_the_first_order_at_least(solver):
    """Those that follow the velocity alone; of others the distribution tells (test_gaussian)."""
    if not draws_noise(solver):
        errors = [error(solver, steps) for steps in (64, 128, 256)]
        assert errors[-1] < 0.02
        rate = math.log2((errors[0] + 1e-13) / (errors[-1] + 1e-13)) / 2
        assert rate > 0.9 or errors[-1] < 1e-10


@pytest.mark.parametrize(
    ("known", "order"),
    [(euler, 1), (heun, 2), (midpoint, 2), (dpmpp_2m, 2), (dpmpp_2m_log_snr, 2)],
)
def test_order_of_convergence(known, order):
    rate = math.log2(error(known, 128) / error(known, 256))
    assert rate == pytest.approx(order, abs=0.1)


def error(solver, steps: int) -> float:
    """Between inner times: towards the ends the clocks of DPM-Solver++ take ever longer steps."""
    grid = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
    reached = solver(growth, torch.ones(1, 1, dtype=torch.float64), grid)
    return abs(reached.item() - math.exp(-1.2))


@pytest.mark.parametrize(
    ("known", "steps", "evaluations"),
    [
        (euler, 5, 5),
        (heun, 5, 9),
        (heun, 1, 1),
        (midpoint, 5, 10),
        (dpmpp_2m, 5, 5),
        (dpmpp_2m_log_snr, 5, 5),
        (euler_ancestral, 5, 5),
    ],
)
def test_number_of_evaluations(known, steps, evaluations):
    velocity = Counted(growth)
    known(velocity, torch.ones(1), Shift().grid(steps))
    assert len(velocity.times) == evaluations


@each_solver
def test_times_are_floats_that_start_at_noise_and_never_reach_data(solver):
    velocity = Counted(growth)
    solver(velocity, torch.ones(1), Shift().grid(4))
    assert all(type(t) is float for t in velocity.times)
    assert velocity.times[0] == 1.0
    assert min(velocity.times) > 0.0  # at t = 0 no network was ever trained


@each_solver
def test_progress_is_told_of_every_step(solver):
    told = []
    z, grid = torch.ones(1, 1, dtype=torch.float64), Shift(alpha=3.0).grid(5)
    reached = solver(growth, z, grid, lambda *step: told.append(step))
    numbers, times, states = zip(*told, strict=True)
    assert numbers == (0, 1, 2, 3, 4)
    assert list(times) == grid[1:].tolist()
    assert torch.equal(states[-1], reached)


@each([*ONE_STEP, *TWO_STEP, euler_ancestral])
def test_progress_is_told_where_it_would_end(known):
    told = []
    z, grid = torch.ones(1, dtype=torch.float64), Shift(alpha=3.0).grid(5)
    known(growth, z, grid, lambda i, t, z: told.append(z))
    for i, state in enumerate(told[:3]):
        assert torch.equal(state, known(growth, z, grid[: i + 2]))


@each_solver
def test_a_grid_of_one_time_is_no_step(solver):
    z = torch.ones(2)
    assert torch.equal(solver(growth, z, torch.zeros(1)), z)


@each_solver
def test_the_starting_noise_is_left_as_it_was(solver):
    z = torch.ones(2, 3)
    solver(growth, z, Shift().grid(3))
    assert torch.equal(z, torch.ones(2, 3))


@each(ONE_STEP)
def test_half_a_grid_then_the_other_half_is_the_whole(known):
    grid = Shift(alpha=3.0).grid(6)
    z = torch.ones(1, dtype=torch.float64)
    halves = known(growth, known(growth, z, grid[:4]), grid[3:])
    assert torch.equal(halves, known(growth, z, grid))


@each(TWO_STEP)
def test_one_step_is_eulers(known):
    z = torch.ones(1, dtype=torch.float64)
    for grid in (Shift().grid(1), torch.tensor([0.8, 0.3])):
        torch.testing.assert_close(known(growth, z, grid), euler(growth, z, grid))


def test_the_second_step_extrapolates_half_a_step_along_minus_log_t():
    grid = torch.tensor([0.8, 0.4, 0.1], dtype=torch.float64)
    z = torch.ones(1, dtype=torch.float64)
    half_way = euler(growth, z, grid[:2])
    first, second = (z_t - t * growth(z_t, t) for z_t, t in ((z, 0.8), (half_way, 0.4)))
    guess = second + (second - first)  # log(0.4 / 0.1) is twice log(0.8 / 0.4)
    torch.testing.assert_close(dpmpp_2m(growth, z, grid), 0.25 * half_way + 0.75 * guess)


def test_the_log_snr_form_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for steps in (1, 2, 5, 20):
        theirs = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        theirs.set_timesteps(steps)
        z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        ours = dpmpp_2m_log_snr(growth, z, theirs.sigmas.double())
        for timestep, t in zip(theirs.timesteps, theirs.sigmas[:-1].tolist(), strict=True):
            z = theirs.step(growth(z, t), timestep, z).prev_sample
        torch.testing.assert_close(ours, z, rtol=0, atol=2e-6)


def test_without_fresh_noise_the_ancestral_sampler_is_eulers():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    for grid in (Shift(alpha=3.0).grid(7), torch.tensor([0.8, 0.5, 0.3]).double()):
        reached = euler_ancestral(growth, z, grid, eta=0.0)
        torch.testing.assert_close(reached, euler(growth, z, grid), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t_next", [0.6, 0.3])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_step_draws_from_the_posterior_of_the_diffusion(eta, t_next):
    """Ho et al. 2020, Eq. 7: the posterior of z_s given z_t and x_0, of variance eta^2 beta~.

    Its symbols are those of the variance-preserving path, onto which the straight one is scaled.
    """
    t, n = 0.8, 200_000
    x_0 = 0.7
    z = torch.full((1, n), 1.3, dtype=torch.float64)
    reached = euler_ancestral(lambda z, t: (z - x_0) / t, z, torch.tensor([t, t_next]), eta=eta)
    (a, b), (a_s, b_s) = ((1 - s, s) for s in (t, t_next))
    abar, abar_s = (u**2 / (u**2 + v**2) for u, v in ((a, b), (a_s, b_s)))
    beta_tilde = (1 - abar_s) / (1 - abar) * (1 - abar / abar_s)
    variance = eta**2 * beta_tilde * (a_s**2 + b_s**2)
    mean = a_s * x_0 + math.sqrt(b_s**2 - variance) * (1.3 - a * x_0) / b
    assert reached.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert reached.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


def test_the_fresh_noise_of_an_image_depends_on_neither_batch_nor_call():
    z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    grid = Shift().grid(5)
    together = euler_ancestral(growth, z, grid)
    assert torch.equal(euler_ancestral(growth, z, grid), together)
    for i in (2, 0, 1):
        alone = euler_ancestral(growth, z[i : i + 1], grid)
        assert torch.equal(alone[0], together[i])


def test_different_images_get_different_fresh_noise():
    z = torch.stack([torch.zeros(1000), torch.full((1000,), 1e-6)])
    grid = torch.tensor([1.0, 0.5])
    fresh = euler_ancestral(lambda z, t: z, z, grid)
    assert fresh.std(dim=1).tolist() == pytest.approx([0.5, 0.5], rel=0.1)
    assert abs(torch.corrcoef(fresh)[0, 1].item()) < 0.15


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_impossible_shares_of_fresh_noise_are_refused(eta):
    with pytest.raises(UserError, match=rf"euler_ancestral: eta {eta} must lie in \[0, 1\]"):
        euler_ancestral(growth, torch.ones(1, 1), Shift().grid(2), eta=eta)
