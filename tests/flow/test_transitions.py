"""Steps of stochastic samplers: densities, marginals, trajectories."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import mmdit
from mmdit.errors import UserError
from mmdit.flow.schedule import PublishedShift, Shift
from mmdit.flow.solvers import euler, stochastic
from mmdit.flow.transitions import (
    CPS,
    Ancestral,
    DanceSDE,
    FlowSDE,
    GaussianSDE,
    Trajectory,
    Transition,
    kl,
    log_prob,
)
from mmdit.registry import describe

PRESERVING = [Ancestral(), Ancestral(eta=0.5), CPS(), CPS(eta=1.0)]
VARIANCES = (1.0, 0.25, 0.01)
CONVERGING = [None, FlowSDE(), DanceSDE(), Ancestral(), GaussianSDE(variance=0.05)]
SILENT = [Ancestral(eta=0.0), CPS(eta=0.0), FlowSDE(a=0.0), DanceSDE(eta=0.0)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def named(transition: Transition) -> str:
    name, *arguments = describe(transition).values()
    return f"{name}({', '.join(map(str, arguments))})"


# --- densities ---


def test_log_probabilities_are_those_of_a_normal_distribution():
    z_next, mean, std = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1), of(0.1, 1.0, 3.0)
    expected = torch.distributions.Normal(mean, std[:, None, None, None]).log_prob(z_next)
    reached = log_prob(z_next, mean, std)
    assert reached.dtype == torch.float64
    torch.testing.assert_close(reached, expected.mean((1, 2, 3)), rtol=1e-13, atol=1e-13)


def test_kl_is_that_of_normal_distributions():
    mean, ref, std = normal(3, 4, 5), normal(3, 4, 5, seed=1), of(0.1, 1.0, 3.0)
    wide_std = std[:, None, None].expand_as(mean)
    of_each = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, wide_std), torch.distributions.Normal(ref, wide_std)
    )
    torch.testing.assert_close(kl(mean, ref, std), of_each.mean((1, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", [log_prob, kl])
def test_densities_are_computed_in_float32_at_least(density):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        a, b = normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype)
        assert density(a, b, of(0.5, 0.5)).dtype == expected


@pytest.mark.parametrize("density", [log_prob, kl])
def test_a_step_without_noise_has_no_density(density):
    with pytest.raises(UserError, match=rf"{density.__name__}: std=\[1.0, 0.0\] must be above 0"):
        density(normal(2, 3), normal(2, 3), of(1.0, 0.0))


@pytest.mark.each("transition")
def test_gradients_by_the_velocity_are_finite_differences(transition):
    z, v, z_next = (normal(2, 2, 2, seed=seed) for seed in range(3))
    t, t_next = of(1.0, 0.6), of(0.7, 0.5)

    def density(v: Tensor) -> Tensor:
        return log_prob(z_next, *transition.moments(v, z, t, t_next))

    assert torch.autograd.gradcheck(density, v.requires_grad_(), atol=1e-6)


# --- single steps ---


@pytest.mark.each("transition")
def test_the_moments_of_a_batch_are_those_of_each_sample_alone(transition):
    z, v = normal(3, 2, 2), normal(3, 2, 2, seed=1)
    t, t_next = of(1.0, 0.6, 0.1), of(0.7, 0.5, 0.0)
    mean, std = transition.moments(v, z, t, t_next)
    assert mean.shape == z.shape and std.shape == t.shape
    for i in range(3):
        alone = transition.moments(*(x[i : i + 1] for x in (v, z, t, t_next)))
        assert torch.equal(alone[0][0], mean[i]) and alone[1][0] == std[i]


@pytest.mark.each("transition")
def test_every_step_is_random_but_the_one_to_data(transition):
    times = Shift(alpha=3.0).grid(12)
    _, fresh = transition.noise(times[:-1], times[1:])
    assert (fresh[:-1] > 0).all()
    assert fresh[-1] == 0
    assert fresh.isfinite().all()


@pytest.mark.parametrize("silent", SILENT, ids=named)
def test_without_noise_a_step_is_eulers(silent):
    v, z = normal(2, 3), normal(2, 3, seed=1)
    t, t_next = of(1.0, 0.6), of(0.7, 0.5)
    mean, std = silent.moments(v, z, t, t_next)
    torch.testing.assert_close(mean, z + (t_next - t)[:, None] * v, rtol=1e-14, atol=1e-14)
    assert (std == 0).all()


@pytest.mark.parametrize("preserving", PRESERVING, ids=named)
def test_if_x_0_is_known_the_coefficients_of_data_and_noise_are_kept(preserving):
    """z' = (1 - t') x_0 + noise of the deviation t', for noise that is independent of x_0."""
    x_0, epsilon = normal(2, 3), normal(2, 3, seed=1)
    t, t_next = of(0.9, 0.3), of(0.5, 0.1)
    z = (1 - t)[:, None] * x_0 + t[:, None] * epsilon
    mean, std = preserving.moments(epsilon - x_0, z, t, t_next)
    kept = (t_next**2 - std**2).sqrt()
    expected = (1 - t_next)[:, None] * x_0 + kept[:, None] * epsilon
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


def test_flow_sde_is_the_step_of_flow_grpo():
    """sd3_sde_with_logprob of its authors, with dt < 0; the second value replaces 1 at t = 1."""
    v, z, a = normal(3, 2), normal(3, 2, seed=1), 0.7
    t, t_next = of(1.0, 0.9, 0.2), of(0.95, 0.6, 0.1)
    mean, std = FlowSDE(a=a).moments(v, z, t, t_next)
    for i, (s, s_next) in enumerate(zip(t.tolist(), t_next.tolist(), strict=True)):
        dt, g = s_next - s, a * math.sqrt(s / (1 - (0.95 if s == 1 else s)))
        expected = z[i] * (1 + g**2 / (2 * s) * dt) + v[i] * (1 + g**2 * (1 - s) / (2 * s)) * dt
        torch.testing.assert_close(mean[i], expected, rtol=1e-12, atol=1e-12)
        assert std[i].item() == pytest.approx(g * math.sqrt(-dt), rel=1e-12)


def test_dance_sde_is_the_step_of_dance_grpo():
    """Euler's step against the score -epsilon / t, with half of eta^2."""
    v, z, eta = normal(1, 5), normal(1, 5, seed=1), 0.3
    mean, std = DanceSDE(eta=eta).moments(v, z, of(0.8), of(0.6))
    score = -(z - (z - 0.8 * v) * 0.2) / 0.8**2
    expected = z - 0.2 * v + eta**2 / 2 * score * 0.2
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    assert std.item() == pytest.approx(eta * math.sqrt(0.2))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_without_variance_the_gaussian_step_is_the_ancestral_one(eta):
    t, t_next = of(1.0, 0.9, 0.3, 0.2), of(0.8, 0.5, 0.1, 0.0)
    for ours, known in zip(
        GaussianSDE(variance=0.0, eta=eta).noise(t, t_next),
        Ancestral(eta=eta).noise(t, t_next),
        strict=True,
    ):
        torch.testing.assert_close(ours, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_gaussian_step_draws_from_the_posterior_given_the_state(variance):
    """Regression of z' on z, where z is z' after more data has been replaced by noise."""
    t, t_next = of(0.8), of(0.3)
    still = (1 - t) / (1 - t_next)
    now, after = marginal(t, variance), marginal(t_next, variance)
    gain, rest = still * after / now, after - still**2 * after**2 / now
    z = of(1.7)
    mean, std = GaussianSDE(variance=variance).moments(optimal(z, t, variance), z, t, t_next)
    torch.testing.assert_close(mean, gain * z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std**2, rest, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FlowSDE(a=-0.1), "FlowSDE: a=-0.1 must be a finite number of at least 0"),
        (lambda: FlowSDE(a=math.inf), "FlowSDE: a=inf must be"),
        (lambda: DanceSDE(eta=math.nan), "DanceSDE: eta=nan must be"),
        (lambda: CPS(eta=1.5), "CPS: eta=1.5 must be a finite number of at least 0 and at most 1"),
        (lambda: Ancestral(eta=-1), "Ancestral: eta=-1 must be"),
        (lambda: GaussianSDE(variance=-1.0), "GaussianSDE: variance=-1.0 must be"),
        (lambda: GaussianSDE(variance=1.0, eta=2), "GaussianSDE: eta=2 must be"),
        (lambda: FlowSDE(eta=0.7), "FlowSDE has no argument 'eta'"),
        (lambda: CPS(eta="0.7"), "CPS: eta='0.7' must be a number"),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    with pytest.raises(UserError) as refusal:
        build()
    assert str(refusal.value).startswith(message)


# --- marginals: data N(0, variance), optimal velocity ---


def marginal(t: Tensor, variance: float) -> Tensor:
    """Variance of z at t."""
    return (1 - t) ** 2 * variance + t**2


def optimal(z: Tensor, t: Tensor, variance: float) -> Tensor:
    """E[epsilon - x_0 | z]."""
    return (t - (1 - t) * variance) / marginal(t, variance) * z


def left(
    transition: Transition | None, grid: Tensor, variance: float, last: int | None = None
) -> list[float]:
    """Variance of z over its true one after each step; None is the ODE by Euler's method.

    A step is linear in z, so that the variance follows exactly: its factor squared, and the noise.
    Steps after the last random one are Euler's.
    """
    t, t_next, one = grid[:-1], grid[1:], torch.ones(len(grid) - 1, dtype=torch.float64)
    v = optimal(one, t, variance)
    eulers, silence = FlowSDE(a=0.0).moments(v, one, t, t_next)
    drawn, fresh = (transition or FlowSDE(a=0.0)).moments(v, one, t, t_next)
    random = torch.arange(len(t)) <= (len(t) if last is None else last)
    factor, std = torch.where(random, drawn, eulers), torch.where(random, fresh, silence)
    ratios, reached = [], 1.0
    true = marginal(t_next, variance)
    for a, noise, expected in torch.stack([factor**2, std**2, true], dim=1).tolist():
        reached = a * reached + noise
        ratios.append(reached / expected)
    return ratios


TABLE = {  # docs/alignment.md: 10 and 28 steps of SD3's grid, data of the variances above
    "ODE": (None, None, (0.67, 0.52, 0.11), (0.88, 0.81, 0.43)),
    "Flow-SDE": (FlowSDE(), None, (0.78, 0.71, 5.56), (0.93, 0.88, 0.90)),
    "Flow-SDE, window": (FlowSDE(), 2, (0.78, 0.60, 0.13), (0.97, 0.90, 0.47)),
    "Dance-SDE": (DanceSDE(), None, (0.68, 0.57, 2.43), (0.88, 0.83, 1.07)),
    "CPS": (CPS(), None, (0.50, 0.41, 0.09), (0.62, 0.58, 0.34)),
    "ancestral": (Ancestral(), None, (0.52, 0.41, 0.07), (0.76, 0.67, 0.32)),
    "Gaussian": (GaussianSDE(), None, (0.54, 0.46, 1.00), (0.78, 0.72, 1.00)),
}


@pytest.mark.parametrize(("transition", "last", "few", "more"), TABLE.values(), ids=TABLE)
def test_few_steps_leave_the_variance_of_the_table(transition, last, few, more):
    for steps, expected in ((10, few), (28, more)):
        grid = PublishedShift(alpha=3.0).grid(steps)
        reached = [left(transition, grid, variance, last)[-1] for variance in VARIANCES]
        assert reached == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("variance", [1e-4, *VARIANCES, 100.0])
def test_the_gaussian_step_keeps_every_marginal_of_its_data(variance, eta):
    transition = GaussianSDE(variance=variance, eta=eta)
    for grid in (PublishedShift(alpha=3.0).grid(10), Shift().grid(3), Shift(alpha=0.3).grid(1)):
        assert left(transition, grid, variance) == pytest.approx([1.0] * (len(grid) - 1), rel=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    "converging", CONVERGING, ids=lambda known: named(known) if known else "ODE"
)
def test_fine_grids_tend_to_the_marginals(converging, variance):
    def off(steps: int) -> float:
        return abs(left(converging, Shift(alpha=3.0).grid(steps), variance)[-1] - 1)

    assert off(8000) < 0.01
    assert off(8000) < off(10) / 20


def test_cps_does_not_tend_to_the_marginals():
    """Each of its steps loses what z leaves open about x_0, however short the step."""
    ratios = [left(CPS(), Shift(alpha=3.0).grid(steps), 1.0)[-1] for steps in (1000, 4000)]
    assert ratios == pytest.approx([0.72, 0.72], abs=0.01)


# --- the solver ---


class Network(nn.Module):
    """A small network whose every value depends on all of its image and on t."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(49, 64)
        self.outer = nn.Linear(64, 48)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = 0.15 * normal(*parameter.shape, seed=seed).float()

    def forward(self, z: Tensor, t: float) -> Tensor:
        times = torch.full((len(z), 1), t)
        hidden = self.inner(torch.cat([z.flatten(1), times], dim=1))
        return self.outer(hidden.tanh()).reshape(z.shape)


NETWORK, GRID = Network().requires_grad_(False), Shift(alpha=3.0).grid(6)
START = normal(5, 3, 4, 4, dtype=torch.float32)


def traced(transition: Transition, z: Tensor = START, **more) -> tuple[Tensor, Trajectory]:
    trajectory = Trajectory()
    solve = functools.partial(stochastic, transition=transition, trajectory=trajectory, **more)
    return solve(NETWORK, z, GRID), trajectory


def recomputed(transition: Transition, trajectory: Trajectory, i: int, rows: slice) -> Tensor:
    """The log-probability of step i under the same network, from the states alone."""
    z, z_next = (state[rows] for state in trajectory.states[i : i + 2])
    t, t_next = (GRID[j].expand(len(z)) for j in (i, i + 1))
    v = NETWORK(z, GRID[i].item())
    return log_prob(z_next, *transition.moments(v, z, t, t_next))


@pytest.mark.each("transition")
def test_recorded_log_probabilities_are_those_of_the_recorded_states(transition):
    reached, trajectory = traced(transition)
    assert len(trajectory.states) == len(GRID)
    assert torch.equal(trajectory.states[0], START)
    assert torch.equal(trajectory.states[-1], reached)
    assert [*trajectory.log_probs] == [0, 1, 2, 3, 4]  # the last step has none
    for i, known in trajectory.log_probs.items():
        assert known.shape == (5,) and known.dtype == torch.float32
        assert torch.equal(recomputed(transition, trajectory, i, slice(None)), known)
        for rows in (slice(0, 1), slice(1, 4)):
            other = recomputed(transition, trajectory, i, rows)
            assert (other - known[rows]).abs().max() < 1e-6


@pytest.mark.each("transition")
def test_fresh_noise_depends_on_the_initial_latent_alone(transition):
    together, _ = traced(transition)
    assert torch.equal(traced(transition)[0], together)
    for i in (3, 0):
        alone, _ = traced(transition, START[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_fresh_noise_is_standard_normal_and_another_for_each_step_and_image():
    z = normal(3, 500)
    trajectory = Trajectory()
    stochastic(lambda z, t: z, z, GRID, transition=CPS(), trajectory=trajectory)
    drawn = []
    for i in range(5):
        z, z_next = trajectory.states[i : i + 2]
        mean, std = CPS().moments(z, z, *(GRID[j].expand(3) for j in (i, i + 1)))
        drawn.append((z_next - mean) / std[:, None])
    noise = torch.cat(drawn)
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)
    assert (torch.corrcoef(noise) - torch.eye(15)).abs().max() < 0.2


@pytest.mark.each("transition")
def test_steps_outside_of_the_window_are_eulers(transition):
    whole, trajectory = traced(transition, window=(1, 2))
    assert [*trajectory.log_probs] == [1, 2]
    assert torch.equal(trajectory.states[1], euler(NETWORK, START, GRID[:2]))
    assert torch.equal(euler(NETWORK, trajectory.states[3], GRID[3:]), whole)
    _, all_random = traced(transition)
    assert not torch.equal(trajectory.states[1], all_random.states[1])


def test_a_trajectory_changes_nothing_and_is_begun_anew():
    reached, trajectory = traced(FlowSDE())
    solve = functools.partial(stochastic, NETWORK, transition=FlowSDE())
    assert torch.equal(solve(START, GRID), reached)
    assert torch.equal(solve(START[:2], GRID[:3], trajectory=trajectory), trajectory.states[2])
    assert len(trajectory.states) == 3 and [*trajectory.log_probs] == [0, 1]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((0, 6), r"window\[1\]=6 must be a whole number from 0 to 5"),
        ((3, 2), r"window\[1\]=2 must be a whole number from 3 to 5"),
        ((-1, 2), r"window\[0\]=-1 must be a whole number from 0 to 5"),
        ((1,), r"window=\[1\] must be two numbers, the first and the last step"),
        (3, "window=3 must be a list"),
        (("0", 1), r"window\[0\]='0' must be a whole number"),
    ],
)
def test_windows_outside_of_the_grid_are_refused(window, message):
    with pytest.raises(UserError, match=message):
        traced(CPS(), window=window)


def test_a_pipeline_samples_by_a_transition(tiny_published):
    pipe = mmdit.load_pipeline(tiny_published)
    trajectory = Trajectory()
    solve = functools.partial(stochastic, transition=CPS(), trajectory=trajectory)
    pipe(["a red cat", "two dogs"], steps=3, guidance=1.0, solver=solve)
    assert [state.shape for state in trajectory.states] == [(2, 16, 24, 24)] * 4
    assert [*trajectory.log_probs] == [0, 1]
