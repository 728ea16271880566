"""Sampling N(mean, deviation^2) with the optimal network, the ODE being solved in closed form."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mmdit.flow.condition import Condition
from mmdit.flow.grids import UniformGrid
from mmdit.flow.objective import Objective
from mmdit.flow.paths import (
    Cosine,
    LDMLinear,
    MatchedEDM,
    Path,
    RectifiedFlow,
    VarianceExploding,
)
from mmdit.flow.predictions import Epsilon, FPrediction, Prediction, V, Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import (
    dpmpp_2m,
    dpmpp_2m_log_snr,
    euler,
    euler_ancestral,
    heun,
    midpoint,
)
from mmdit.flow.timesteps import Uniform

MEAN, DEVIATION = 0.8, 0.4
# The midpoint rule has order 2, and here 3: with S the deviation, its error of h^3 is
# (S'' S^3)' / (24 S^3), and S^2 is a quadratic in sigma, of which S'' S^3 is constant.
ORDERS = {euler: 1, heun: 2, midpoint: 3, dpmpp_2m: 2, dpmpp_2m_log_snr: 2}
each_known = pytest.mark.parametrize("known", ORDERS, ids=lambda solver: solver.__name__)
NOTHING = Condition(torch.zeros(1, 1), torch.zeros(1, 1, 1))


class Optimal:
    """The network of least loss, of what the prediction shows it: no more, and in those units."""

    def __init__(self, path: Path, prediction: Prediction) -> None:
        self.path, self.prediction = path, prediction

    def __call__(self, shown: Tensor, time: Tensor, c_vec: Tensor, c_ctxt: Tensor) -> Tensor:
        time = time[:, None]
        if isinstance(self.prediction, FPrediction):
            return self.of_edm(shown, (4 * time).exp())
        a, b = self.path.a(time), self.path.b(time)
        x_0 = posterior_mean(shown, a, b)
        epsilon = (shown - a * x_0) / b
        if isinstance(self.prediction, Epsilon):
            return epsilon
        if isinstance(self.prediction, V):
            return a * epsilon - b * x_0
        return self.path.da(time) * x_0 + self.path.db(time) * epsilon

    def of_edm(self, shown: Tensor, sigma: Tensor) -> Tensor:
        """Karras et al. 2022, Table 1: all from c_in z and c_noise = log(sigma) / 4."""
        sigma_data = self.prediction.sigma_data
        total = sigma**2 + sigma_data**2
        z = total.sqrt() * shown
        denoised = posterior_mean(z, torch.ones_like(sigma), sigma)
        return (denoised - sigma_data**2 / total * z) / (sigma * sigma_data / total.sqrt())


def posterior_mean(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[x_0 | z] for z = a x_0 + b epsilon."""
    gain = a * DEVIATION**2 / (a**2 * DEVIATION**2 + b**2)
    return MEAN + gain * (z - a * MEAN)


def marginal(sigma: float) -> tuple[float, float]:
    """Mean and deviation of z at a noise level of the straight path."""
    return (1 - sigma) * MEAN, math.hypot((1 - sigma) * DEVIATION, sigma)


def exact(z: Tensor, start: float, end: float) -> Tensor:
    """The solution of the ODE: it keeps every z at the same quantile of the marginal."""
    (mean, deviation), (mean_end, deviation_end) = marginal(start), marginal(end)
    return mean_end + deviation_end / deviation * (z - mean)


def objective_of(path: Path, prediction: Prediction, alpha: float = 1.0) -> Objective:
    return Objective(
        path=path, timesteps=Uniform(), prediction=prediction, shift=Shift(alpha=alpha)
    )


def velocity_of(objective: Objective, network=None):
    network = network or Optimal(objective.path, objective.prediction)
    return lambda z, sigma: objective.velocity(network, z, sigma, NOTHING)


def noise(n: int = 5) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def predictions_on(path: Path) -> list[Prediction]:
    """EDM's preconditioning tells the network b_t alone, which is all it needs where a_t = 1."""
    of_edm = [FPrediction(), FPrediction(sigma_data=1.0)]
    return [Velocity(), Epsilon(), V(), *(of_edm if isinstance(path, VarianceExploding) else [])]


@pytest.mark.each("path")
@pytest.mark.parametrize("sigma", [1.0, 0.9, 0.5, 0.1, 0.002])
def test_the_optimal_network_moves_the_straight_path_by_the_exact_velocity(path, sigma):
    sigma, z = min(sigma, path.noisiest), noise()
    mean, deviation = marginal(sigma)
    # dz/dsigma of mean(sigma) + deviation(sigma) q, for the quantile q = (z - mean) / deviation.
    growth = (sigma - (1 - sigma) * DEVIATION**2) / deviation**2
    expected = -MEAN + growth * (z - mean)
    for prediction in predictions_on(path):
        if sigma == 1.0 and not isinstance(prediction, Velocity):
            continue  # all is noise, and nothing of the data can be read from an epsilon or a v
        velocity = velocity_of(objective_of(path, prediction))
        torch.testing.assert_close(velocity(z, sigma), expected, rtol=1e-7, atol=1e-7)


@each_known
def test_every_solver_has_its_order_on_every_path(sampled, known):
    """Between inner noise levels, where the steps of all clocks shrink evenly.

    On whole grids no order can be proved: towards their ends the clocks of DPM-Solver++ take ever
    longer steps, Karras's last step does not shrink, that of latent diffusion as a root.
    """
    velocity, z = velocity_of(sampled), noise()
    start, end = 0.9, 0.1

    def error(steps: int) -> float:
        grid = torch.linspace(start, end, steps + 1, dtype=torch.float64)
        return (known(velocity, z, grid) - exact(z, start, end)).abs().max().item()

    assert math.log2(error(48) / error(96)) == pytest.approx(ORDERS[known], abs=0.15)


@each_known
def test_every_solver_reaches_the_data_from_where_its_path_starts(sampled, known):
    """Whole grids, from noise to data."""
    velocity, z = velocity_of(sampled), noise()

    def error(steps: int) -> float:
        times = sampled.times(steps)
        expected = exact(times[0].item() * z, times[0].item(), 0.0)
        reached = known(velocity, times[0].item() * z, times)
        return (reached - expected).abs().max().item()

    few, many = error(8), error(128)
    # First order is the least on each grid: by 16, less a factor for the long steps of the first.
    assert many < few / 5
    assert many < 0.1 * DEVIATION


@pytest.mark.each("solver")
def test_every_solver_tends_to_the_distribution_of_the_data(solver):
    """Whether it draws noise of its own or not, from wherever it starts."""
    velocity = velocity_of(objective_of(RectifiedFlow(), Velocity()))
    z = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def off(steps: int) -> float:
        reached = solver(velocity, z, Shift(alpha=3.0).grid(steps))
        return max(abs(reached.mean().item() - MEAN), abs(reached.std().item() - DEVIATION))

    assert off(160) < max(off(10) / 4, 0.02)
    assert off(160) < 0.06 * DEVIATION


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_ancestral_sampler_tends_to_the_distribution_of_the_data(sampled, eta):
    n = 20_000
    z = torch.randn(1, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def deviation(steps: int) -> float:
        times = sampled.times(steps)
        start = times[0].item() * z
        reached = euler_ancestral(velocity_of(sampled), start, times, eta=eta)
        assert reached.mean().item() == pytest.approx(MEAN, abs=0.02)
        return reached.std().item()

    few, many = deviation(10), deviation(160)
    assert abs(many - DEVIATION) < abs(few - DEVIATION) / 4
    assert many == pytest.approx(DEVIATION, rel=0.06)


def wavy(shown, time, c_vec, c_ctxt):
    """A network of no formulation in particular."""
    return torch.sin(3 * shown) + torch.cos(shown + time[:, None])


@pytest.mark.parametrize("path", [Cosine(), LDMLinear()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("prediction", [Epsilon(), V(), Velocity()], ids=lambda p: type(p).__name__)
def test_euler_is_ddim_on_paths_that_preserve_variance(path, prediction):
    """Song et al. 2021, Eq. 12 with sigma = 0: z_s = a_s x_0 + b_s epsilon."""
    objective = objective_of(path, prediction, alpha=1.5)
    times = objective.times(9, grid=UniformGrid())
    t = path.time_at(times)
    a, b = path.a(t).tolist(), path.b(t).tolist()
    z = times[0].item() * noise()
    reached = euler(velocity_of(objective, wavy), z, times)

    x = (a[0] + b[0]) * z
    for i in range(9):
        output = wavy(x, t[i : i + 1], *NOTHING[:2])
        if isinstance(prediction, Epsilon):
            epsilon = output
            x_0 = (x - b[i] * epsilon) / a[i]
        elif isinstance(prediction, V):
            x_0, epsilon = a[i] * x - b[i] * output, b[i] * x + a[i] * output
        else:  # the derivative by time: of the angle, whose sine is b, times its speed
            speed = path.db(t[i : i + 1]).item() / a[i]
            x_0 = a[i] * x - b[i] * output / speed
            epsilon = b[i] * x + a[i] * output / speed
        x = a[i + 1] * x_0 + b[i + 1] * epsilon
    torch.testing.assert_close(reached, x, rtol=1e-10, atol=1e-10)


def test_euler_is_that_of_karras_on_paths_that_explode():
    """Karras et al. 2022, Algorithm 1 without its correction: x += (s' - s) (x - D) / s."""
    path, prediction = MatchedEDM(), FPrediction()
    objective = objective_of(path, prediction)
    times = objective.times(9)
    z = times[0].item() * noise()
    reached = euler(velocity_of(objective, wavy), z, times)

    levels = (times / (1 - times)).tolist()
    x = (1 + levels[0]) * z
    for s, s_next in itertools.pairwise(levels):
        total = s**2 + 0.25
        noise_level = torch.tensor([math.log(s) / 4], dtype=torch.float64)
        output = wavy(x / math.sqrt(total), noise_level, *NOTHING[:2])
        denoised = 0.25 / total * x + s * 0.5 / math.sqrt(total) * output
        x = x + (s_next - s) * (x - denoised) / s
    torch.testing.assert_close(reached, x, rtol=1e-10, atol=1e-10)
