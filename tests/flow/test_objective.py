import math

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.grids import CosineGrid, KarrasGrid, LDMGrid, UniformGrid
from mmdit.flow.objective import Draw, Objective
from mmdit.flow.paths import EDM, Cosine, LDMLinear, MatchedEDM, RectifiedFlow
from mmdit.flow.predictions import Epsilon, FPrediction, V, Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import CosMap, DiscreteUniform, LogitNormal, Mode, Uniform
from mmdit.keys import generator_for

B = 4
SHAPE = (B, B, B)  # every side equals the batch: a loss that broadcast over another axis would run
X_0 = torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(0))
TEXT = Condition(torch.zeros(B, 3), torch.zeros(B, 5, 6))


def objective(timesteps=None, alpha=1.0) -> Objective:
    return Objective(
        path=RectifiedFlow(),
        timesteps=timesteps or LogitNormal(),
        prediction=Velocity(),
        shift=Shift(alpha=alpha),
    )


def generators(*indices: int) -> list[torch.Generator]:
    return [generator_for(0, "noise", index) for index in indices]


def halving(z_t, t, c_vec, c_ctxt):
    return z_t / 2


def test_a_perfect_model_has_no_loss():
    def perfect(z_t, t, c_vec, c_ctxt):
        return (z_t - X_0) / t[:, None, None, None]

    loss = objective()(perfect, X_0, TEXT, objective().draw(SHAPE, generators(0, 1, 2, 3)))
    assert loss.shape == (B,)
    assert loss.max() < 1e-10


def test_a_model_that_predicts_zero_has_the_mean_square_of_the_target():
    draw = objective().draw(SHAPE, generators(0, 1, 2, 3))
    loss = objective()(lambda z_t, *_: torch.zeros_like(z_t), X_0, TEXT, draw)
    torch.testing.assert_close(loss, (draw.epsilon - X_0).square().mean(dim=(1, 2, 3)))


def test_the_model_is_called_with_the_noised_latent_its_time_and_its_text():
    called = []
    draw = Draw(torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.randn(B, *SHAPE))
    text = Condition(torch.randn(B, 3), torch.randn(B, 5, 6))

    def model(*arguments):
        called.append(arguments)
        return arguments[0]

    objective()(model, X_0, text, draw)
    ((z_t, t, c_vec, c_ctxt),) = called
    assert t is draw.t and c_vec is text[0] and c_ctxt is text[1]
    for i in range(B):
        torch.testing.assert_close(z_t[i], (1 - t[i]) * X_0[i] + t[i] * draw.epsilon[i])


def test_what_a_sample_draws_does_not_depend_on_its_batch():
    together = objective().draw(SHAPE, generators(0, 1, 2, 3))
    reordered = objective().draw(SHAPE, generators(3, 1))
    for mine, theirs in ((3, 0), (1, 1)):
        assert together.t[mine] == reordered.t[theirs]
        assert torch.equal(together.epsilon[mine], reordered.epsilon[theirs])
    assert together.t.unique().numel() == B


def test_the_loss_of_a_sample_does_not_depend_on_the_others():
    draw = objective().draw(SHAPE, generators(0, 1, 2, 3))
    before = objective()(halving, X_0, TEXT, draw)
    others = X_0.clone()
    others[1:] += 3.0
    after = objective()(halving, others, TEXT, draw)
    assert after[0] == before[0]
    assert (after[1:] != before[1:]).all()


def test_training_draws_pass_through_the_shift_of_the_sampler():
    plain = objective(alpha=1.0).draw(SHAPE, generators(0, 1, 2, 3))
    shifted = objective(alpha=3.0).draw(SHAPE, generators(0, 1, 2, 3))
    torch.testing.assert_close(shifted.t, Shift(alpha=3.0)(plain.t))
    assert torch.equal(shifted.epsilon, plain.epsilon)


def test_the_draw_is_noise_of_unit_variance_and_float32():
    draw = objective().draw((16, 16, 16), generators(*range(B)))
    assert draw.t.dtype == draw.epsilon.dtype == torch.float32
    assert draw.epsilon.mean().item() == pytest.approx(0.0, abs=0.04)
    assert draw.epsilon.std().item() == pytest.approx(1.0, abs=0.03)


def test_the_loss_is_taken_in_float32_whatever_the_model_computes_in():
    draw = objective().draw(SHAPE, generators(0, 1, 2, 3))
    loss = objective()(lambda z_t, *_: z_t.bfloat16(), X_0, TEXT, draw)
    z_t = RectifiedFlow().interpolate(X_0, draw.epsilon, draw.t).bfloat16().float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (z_t - draw.epsilon + X_0).square().mean(dim=(1, 2, 3)))


@pytest.mark.each("path")
@pytest.mark.parametrize("alpha", [1 / 3, 1.0, 3.0])
def test_the_shift_moves_the_log_snr_of_every_path_alike(path, alpha):
    def drawn(alpha):
        parts = {"path": path, "timesteps": LogitNormal(s=0.5), "prediction": Epsilon()}
        draw = Objective(**parts, shift=Shift(alpha=alpha)).draw((1,), generators(*range(50)))
        return draw.t.double()

    before, after = drawn(1.0), drawn(alpha)
    inside = after < 1.0  # what is moved beyond the end of a path stays there
    assert inside.sum() > 20
    moved = path.log_snr(after[inside]) - path.log_snr(before[inside])
    torch.testing.assert_close(
        moved, torch.full_like(moved, -2 * math.log(alpha)), rtol=0, atol=1e-4
    )


# Equal steps in logit t, which follow the poles that some densities have at both ends.
LOGITS = torch.linspace(-32.0, 32.0, 64_001, dtype=torch.float64)
TIMES = LOGITS.sigmoid()
WIDTHS = TIMES * (1 - TIMES) * (LOGITS[1] - LOGITS[0])


def gathered_at_the_end(objective: Objective) -> float:
    """Share of the draws that the shift moves beyond the end of the path."""
    end = torch.tensor(objective.path.straight(torch.ones(1).double()).item()).double()
    if end > 0.999 or objective.shift.alpha <= 1.0:
        return 0.0
    last = objective.path.time_at(objective.shift.inverse(end)).item()  # shifted to the end
    return 1.0 - last  # of uniform times


def test_the_density_of_shifted_times_integrates_to_one(shifted):
    total = (shifted.density(TIMES) * WIDTHS).sum().item()
    assert total == pytest.approx(1.0 - gathered_at_the_end(shifted), abs=2e-4)


def test_only_the_path_that_keeps_some_signal_gathers_draws_at_its_end():
    gathered = gathered_at_the_end(family(LDMLinear(), DiscreteUniform(), Epsilon(), 3.0))
    assert 0.1 < gathered < 0.5
    assert gathered_at_the_end(family(Cosine(), Uniform(), Epsilon(), 3.0)) == 0.0
    assert gathered_at_the_end(family(EDM(), Uniform(), FPrediction(), 3.0)) == 0.0


def test_draws_follow_the_density_of_shifted_times(shifted):
    """Kolmogorov-Smirnov; the discrete times of latent diffusion jump by their step, 1/1000."""
    n, generator = 2000, torch.Generator().manual_seed(0)
    t = shifted.draw((1,), [generator] * n).t.double().sort().values
    distribution = torch.cat([torch.zeros(1).double(), (shifted.density(TIMES) * WIDTHS).cumsum(0)])
    inside = t < 1.0
    expected = distribution[torch.searchsorted(TIMES, t[inside])]
    observed = (torch.arange(n)[inside] + 0.5) / n
    assert (expected - observed).abs().max() < 1.95 / math.sqrt(n) + 3e-3
    gathered = gathered_at_the_end(shifted)
    spread = math.sqrt(gathered * (1 - gathered) / n)
    assert (~inside).double().mean().item() == pytest.approx(gathered, abs=4 * spread + 1.5e-3)


def family(path, timesteps, prediction, alpha=1.0) -> Objective:
    return Objective(
        path=path, timesteps=timesteps, prediction=prediction, shift=Shift(alpha=alpha)
    )


def normal(x, mean, deviation):
    return torch.exp(-((x - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))


# Sec. 2: w of t, lambda, and pi, up to a constant.
WEIGHTS = {
    "rf": (RectifiedFlow(), Uniform(), Velocity(), lambda t, _: t / (1 - t)),
    "rf/mode(1.29)": (
        *(RectifiedFlow(), Mode(s=1.29), Velocity()),
        lambda t, _: t / (1 - t) * Mode(s=1.29).pdf(t),
    ),
    "rf/lognorm(0.5,0.6)": (
        *(RectifiedFlow(), LogitNormal(m=0.5, s=0.6), Velocity()),
        lambda t, _: t / (1 - t) * normal(torch.logit(t), 0.5, 0.6) / (t * (1 - t)),
    ),
    "rf/cosmap": (
        *(RectifiedFlow(), CosMap(), Velocity()),
        lambda t, _: t / (1 - t) * 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2),
    ),
    "eps/cos": (Cosine(), Uniform(), Epsilon(), lambda _, log_snr: 1 / torch.cosh(log_snr / 2)),
    "v/cos": (Cosine(), Uniform(), V(), lambda _, log_snr: torch.exp(-log_snr / 2)),
    "edm(-1.2,1.2)": (
        *(EDM(), Uniform(), FPrediction()),
        lambda _, log_snr: normal(log_snr, 2.4, 2.4) * (torch.exp(-log_snr) + 0.25),
    ),
    "edm(0.6,0.6)": (
        *(EDM(P_m=0.6, P_s=0.6), Uniform(), FPrediction()),
        lambda _, log_snr: normal(log_snr, -1.2, 1.2) * (torch.exp(-log_snr) + 0.25),
    ),
    "edm/rf": (MatchedEDM(), Uniform(), FPrediction(), lambda _, log_snr: (-log_snr / 2).exp()),
}


@pytest.mark.parametrize("row", WEIGHTS.values(), ids=WEIGHTS)
def test_the_effective_weight_is_that_of_the_paper_up_to_a_constant(row):
    *parts, paper = row
    objective = family(*parts)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    ratio = objective.weight(t) / paper(t, objective.path.log_snr(t))
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", [Epsilon(), V()], ids=["eps", "v"])
def test_the_effective_weight_on_the_linear_path_is_what_its_squared_error_implies(prediction):
    """Of epsilon w = -2 / lambda'; of v, whose error is that of epsilon over a, also 1 / a^2."""
    path = LDMLinear()
    t = torch.linspace(0.0103, 0.9899, 99, dtype=torch.float64)
    expected = -2 / path.d_log_snr(t)
    if isinstance(prediction, V):
        expected = expected / path.a(t) ** 2
    weight = family(path, DiscreteUniform(), prediction).weight(t)
    torch.testing.assert_close(weight, expected, rtol=1e-10, atol=0)


def test_rf_and_its_match_in_edm_weigh_noise_levels_by_the_same_function():
    """edm/rf, of log-SNR: w(lambda) = e^(-lambda/2) for both, which is also that of v/cos."""
    log_snr = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64)
    sigma = torch.sigmoid(-log_snr / 2)
    rows = (WEIGHTS["rf"], WEIGHTS["edm/rf"], WEIGHTS["v/cos"])
    weights = [family(*parts).weight(parts[0].time_at(sigma)) for *parts, _ in rows]
    for weight in weights:
        ratio = weight / torch.exp(-log_snr / 2)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-8, atol=0)


def biased(shown, time, c_vec, c_ctxt):
    """A network with an error at every noise level, a different one at each."""
    return shown


def test_sampled_and_weighted_losses_agree_in_expectation(trained):
    """Sec. 3.1: pi(t) is a sampling density; the three forms of the loss are one (Eq. 12)."""
    n, generator = 200_000, torch.Generator().manual_seed(0)
    x_0, noises = torch.zeros(n, 1, 1, 1), torch.randn(3, n, 1, 1, 1, generator=generator)
    text = Condition(torch.zeros(n, 1), torch.zeros(n, 1, 1))
    path, prediction = trained.path, trained.prediction

    sampled = trained(biased, x_0, text, Draw(trained.timesteps.sample(n, generator), noises[0]))

    t = Uniform().sample(n, generator)
    plain = trained(biased, x_0, text, Draw(t, noises[1]))
    weighted = trained.density(t) * plain

    t = Uniform().sample(n, generator).double()
    z_t = path.interpolate(x_0.double(), noises[2].double(), t)
    output = biased(*prediction.inputs(path, z_t, t), text.c_vec, text.c_ctxt)
    error = (prediction.epsilon(path, output, z_t, t) - noises[2]).square().flatten()
    of_noise = -trained.weight(t) * path.d_log_snr(t) / 2 * error

    for other in (weighted, of_noise):
        difference = (sampled.mean() - other.mean()).abs().item()
        assert difference < 3 * (sampled.var() / n + other.var() / n).sqrt().item()
    if not isinstance(trained.timesteps, Uniform | DiscreteUniform):  # so the test can fail
        spread = (sampled.var() / n + plain.var() / n).sqrt().item()
        assert (sampled.mean() - plain.mean()).abs().item() > 6 * spread


def test_rectified_flow_gives_the_output_of_the_network_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    z, output = torch.randn(2, 2, 4, 3, 3, generator=generator)
    condition = Condition(torch.zeros(2, 1), torch.zeros(2, 1, 1))
    for sigma in (1.0, 1e-3, *torch.rand(300, generator=generator, dtype=torch.float64).tolist()):

        def network(shown, time, c_vec, c_ctxt, sigma=sigma):
            assert torch.equal(shown, z)
            assert torch.equal(time, torch.full((2,), sigma))  # float32, one for each image
            return output

        velocity = objective().velocity(network, z, sigma, condition)
        assert velocity.dtype == torch.float32 and torch.equal(velocity, output)


def test_the_velocity_is_float32_whatever_the_network_computes_in(trained):
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    condition = Condition(torch.zeros(2, 1), torch.zeros(2, 1, 1))
    half = trained.velocity(lambda *inputs: biased(*inputs).bfloat16(), z, 0.5, condition)
    assert half.dtype == torch.float32
    full = trained.velocity(biased, z, 0.5, condition)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


def test_the_network_is_told_the_same_time_whatever_the_precision_of_the_latent(sampled):
    """In bfloat16 only 507 of 1001 timesteps would stay distinct."""
    told = []

    def network(shown, time, c_vec, c_ctxt):
        told.append(time)
        return shown

    condition = Condition(torch.zeros(2, 1), torch.zeros(2, 1, 1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sampled.velocity(network, torch.ones(2, 4, 3, 3, dtype=dtype), 0.301, condition)
    single, *halves = told
    assert single.dtype == torch.float32 and (single != single.bfloat16()).all()
    for half in halves:
        assert torch.equal(half, single) and half.dtype == single.dtype


@pytest.mark.each("path")
def test_the_network_is_asked_at_the_same_noise_level_of_its_own_path(path):
    z, asked = torch.randn(3, 2, dtype=torch.float64), []

    def network(shown, time, c_vec, c_ctxt):
        asked.append((shown, time))
        return shown

    condition = Condition(torch.zeros(3, 1), torch.zeros(3, 1, 1))
    for sigma in (0.8, 0.5, 0.01):
        family(path, Uniform(), V()).velocity(network, z, sigma, condition)
        shown, time = asked.pop()
        assert time.shape == (3,)
        assert path.straight(time).tolist() == pytest.approx([sigma] * 3)
        torch.testing.assert_close(shown, (path.a(time) + path.b(time))[:, None] * z)


def test_times_fall_from_where_the_path_starts(shifted):
    for grid in (None, UniformGrid(), KarrasGrid()):
        times = shifted.times(10, grid=grid)
        assert len(times) == 11 and times[-1] == 0.0 and (times.diff() < 0).all()
        assert times[0].item() <= shifted.path.noisiest
        assert torch.equal(shifted.times(10, grid=grid, strength=0.5), times[5:])
    assert shifted.times(10, grid=UniformGrid())[0].item() == shifted.path.noisiest


def test_a_strength_outside_of_0_to_1_has_no_times():
    for strength in (-0.1, 1.1):
        with pytest.raises(UserError, match=f"strength {strength} must lie in"):
            objective().times(7, strength=strength)


@pytest.mark.parametrize(
    ("path", "grid"),
    [(Cosine(last=0.9), CosineGrid()), (LDMLinear(beta_start=1e-4, beta_end=0.02), LDMGrid())],
    ids=["cosine", "linear"],
)
def test_a_formulation_samples_from_the_start_of_its_own_path_in_its_own_time(path, grid):
    times = mixed(path, V(), grid).times(8)
    assert times[0].item() == path.noisiest
    steps = path.time_at(times).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))


def test_a_formulation_has_the_uniform_grid_unless_it_names_one():
    assert torch.equal(objective(alpha=3.0).times(7), Shift(alpha=3.0).grid(7))


def mixed(path, prediction, grid=None) -> Objective:
    return Objective(
        path=path, timesteps=Uniform(), prediction=prediction, shift=Shift(), grid=grid
    )


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), LDMLinear()], ids=type)
def test_the_prediction_of_edm_needs_the_path_of_edm(path):
    with pytest.raises(UserError, match=f"does not fit {type(path).__name__}, which lacks a_t"):
        mixed(path, FPrediction())


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(last=1.0)], ids=type)
def test_noise_alone_does_not_tell_an_epsilon_prediction_the_data(path):
    """At sigma = 1 the data would be a difference of two noises, divided by zero."""
    with pytest.raises(UserError, match=r"does not determine the data at sigma = 1, where Uniform"):
        mixed(path, Epsilon()).times(4)
    starts_below = mixed(path, Epsilon(), KarrasGrid())
    assert starts_below.times(4)[0] < 1
    assert mixed(path, Epsilon()).times(4, strength=0.5)[0] == 0.5
    with pytest.raises(UserError, match="UniformGrid"):
        starts_below.times(4, grid=UniformGrid())
