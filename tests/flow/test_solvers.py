import math

import pytest
import torch
from torch import Tensor

from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import euler, heun, midpoint

SOLVERS = [euler, heun, midpoint]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.__name__)


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


@each_solver
@pytest.mark.parametrize("steps", [1, 5])
def test_straight_paths_are_followed_exactly(solver, steps):
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    reached = solver(lambda z, t: epsilon - x_0, epsilon, Shift(alpha=3.0).grid(steps))
    torch.testing.assert_close(reached, x_0)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (midpoint, 2)])
def test_order_of_convergence(solver, order):
    z = torch.ones(1, dtype=torch.float64)

    def error(steps: int) -> float:
        reached = solver(growth, z, Shift(alpha=1.0).grid(steps))
        return abs(reached.item() - math.exp(-1.5))

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    ("solver", "steps", "evaluations"),
    [(euler, 5, 5), (heun, 5, 9), (heun, 1, 1), (midpoint, 5, 10)],
)
def test_number_of_evaluations(solver, steps, evaluations):
    velocity = Counted(growth)
    solver(velocity, torch.ones(1), Shift().grid(steps))
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
    solver(growth, torch.ones(1), Shift().grid(5), lambda: told.append(None))
    assert len(told) == 5


@each_solver
def test_the_starting_noise_is_left_as_it_was(solver):
    z = torch.ones(2, 3)
    solver(growth, z, Shift().grid(3))
    assert torch.equal(z, torch.ones(2, 3))


@each_solver
def test_half_a_grid_then_the_other_half_is_the_whole(solver):
    grid = Shift(alpha=3.0).grid(6)
    z = torch.ones(1, dtype=torch.float64)
    halves = solver(growth, solver(growth, z, grid[:4]), grid[3:])
    assert torch.equal(halves, solver(growth, z, grid))
