import math

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.paths import EDM, Cosine, LDMLinear, MatchedEDM, Path, RectifiedFlow, like
from mmdit.flow.timesteps import Uniform

# Off the knots of LDMLinear, where its slope jumps.
INNER = torch.linspace(0.0103, 0.9899, 27, dtype=torch.float64)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)
each_path = pytest.mark.each("path")


@pytest.mark.parametrize(
    ("value", "derivative"), [("a", "da"), ("b", "db"), ("log_snr", "d_log_snr")]
)
@each_path
def test_derivatives_match_autograd(path, value, derivative):
    t = INNER.clone().requires_grad_()
    # 0 * t: where a_t = 1 for all t, its graph is empty.
    (slope,) = torch.autograd.grad((getattr(path, value)(t) + 0 * t).sum(), t)
    torch.testing.assert_close(getattr(path, derivative)(INNER), slope, rtol=1e-10, atol=1e-10)


@each_path
def test_a_path_runs_from_data_to_noise(path):
    log_snr = path.log_snr(INNER)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr, (path.a(INNER) ** 2 / path.b(INNER) ** 2).log())
    torch.testing.assert_close(path.a(ENDS)[0].item(), 1.0)
    assert path.b(ENDS)[0] < 1e-9


@each_path
def test_the_straight_time_rises_between_zero_and_one(path):
    sigma = path.straight(INNER)
    assert (sigma.diff() > 0).all() and sigma[0] > 0 and sigma[-1] < 1
    assert path.straight(ENDS)[0] < 1e-9


@each_path
def test_the_straight_path_is_as_noisy_at_the_straight_time(path):
    there = RectifiedFlow().log_snr(path.straight(INNER))
    torch.testing.assert_close(there, path.log_snr(INNER), rtol=1e-12, atol=1e-12)


@each_path
def test_time_at_inverts_straight(path):
    torch.testing.assert_close(path.time_at(path.straight(INNER)), INNER, rtol=0, atol=1e-12)
    sigma = torch.tensor([1e-6, 1e-4, 0.002, *INNER], dtype=torch.float64) * path.noisiest
    torch.testing.assert_close(path.straight(path.time_at(sigma)), sigma, rtol=1e-10, atol=0)
    assert path.time_at(torch.zeros(1, dtype=torch.float64)).item() < 1e-9


@each_path
def test_the_path_can_be_entered_where_sampling_starts(path):
    sigma = torch.tensor(path.noisiest, dtype=torch.float64)
    t = path.time_at(sigma)
    assert 0.9 < t <= 1.0 and 0.0 < sigma <= 1.0
    torch.testing.assert_close(path.straight(t), sigma, rtol=1e-6, atol=0)


def test_sampling_starts_where_each_path_says():
    ratio = {kind: path.noisiest / (1 - path.noisiest) for kind, path in START.items()}
    assert RectifiedFlow().noisiest == 1.0
    assert ratio["cosine"] == pytest.approx(math.tan(0.98 * math.pi / 2))
    assert ratio["edm"] == pytest.approx(80.0) and ratio["matched"] == pytest.approx(80.0)
    # In float64 the quantile of the largest t below 1 is 8.21: this path ends before b = 80.
    assert ratio["narrow"] == pytest.approx(math.exp(-1.2 + 0.6 * 8.2095), rel=1e-4)
    # All betas of latent diffusion leave the share 0.068 of the data.
    assert ratio["linear"] == pytest.approx(math.sqrt(1 - 0.0683**2) / 0.0683, rel=1e-3)


START = {
    "cosine": Cosine(),
    "linear": LDMLinear(),
    "edm": EDM(),
    "narrow": EDM(P_m=-1.2, P_s=0.6),
    "matched": MatchedEDM(),
}


@each_path
def test_velocity_is_the_derivative_of_the_interpolation(path):
    x_0, epsilon = torch.randn(2, 3, 2, 4, 4, generator=generator(), dtype=torch.float64)
    t = torch.tensor([0.2003, 0.5003, 0.9003], dtype=torch.float64)
    h = 1e-5
    ahead, behind = (path.interpolate(x_0, epsilon, t + step) for step in (h, -h))
    numeric = (ahead - behind) / (2 * h)
    torch.testing.assert_close(path.velocity(x_0, epsilon, t), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["interpolate", "velocity"])
@pytest.mark.parametrize("shape", [(4, 4, 4, 4), (4, 4), (4,)], ids=str)
@each_path
def test_each_sample_has_its_own_time(path, method, shape):
    # Equal sides, so that a coefficient broadcast along another axis would still run.
    x_0, epsilon = torch.randn(2, *shape, generator=generator())
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    together = getattr(path, method)(x_0, epsilon, t)
    assert together.shape == shape
    for i in range(4):
        alone = getattr(path, method)(x_0[i : i + 1], epsilon[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_like_keeps_a_coefficient_to_its_sample():
    coefficient = like(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, 3, 4, 4))
    assert coefficient.shape == (2, 1, 1, 1) and coefficient.dtype == torch.float32


@each_path
def test_values_are_finite_at_every_time_that_float32_can_draw(path):
    nearest = torch.finfo(torch.float32)
    t = torch.tensor([nearest.tiny, 1e-9, 0.5, 1.0 - nearest.eps / 2, 1.0])
    for value in (path.a(t), path.b(t), path.da(t), path.straight(t)):
        assert value.isfinite().all() and value.dtype == torch.float32


def test_rectified_flow_is_the_straight_line():
    x_0, epsilon = torch.randn(2, 3, 2, 4, 4, generator=generator())
    t = torch.tensor([0.0, 0.25, 1.0])
    z_t = RectifiedFlow().interpolate(x_0, epsilon, t)
    assert torch.equal(z_t[0], x_0[0])
    torch.testing.assert_close(z_t[1], 0.75 * x_0[1] + 0.25 * epsilon[1])
    assert torch.equal(z_t[2], epsilon[2])
    torch.testing.assert_close(RectifiedFlow().velocity(x_0, epsilon, t), epsilon - x_0)


@pytest.mark.parametrize("path", [Cosine(), LDMLinear()], ids=lambda path: type(path).__name__)
def test_variance_is_preserved(path):
    squares = path.a(INNER) ** 2 + path.b(INNER) ** 2
    torch.testing.assert_close(squares, torch.ones_like(INNER))


def test_log_snr_of_edm_is_normal_for_uniform_times():
    """Table row edm(P_m, P_s): lambda ~ N(-2 P_m, (2 P_s)^2)."""
    n = 100_000
    t = Uniform().sample(n, generator()).double()
    for path in (EDM(), EDM(P_m=0.6, P_s=0.6)):
        log_snr = path.log_snr(t).sort().values
        standard = (log_snr + 2 * path.P_m) / (2 * path.P_s)
        observed = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        assert (torch.special.ndtr(standard) - observed).abs().max() < 1.95 / math.sqrt(n)


def test_log_snr_of_matched_edm_is_a_hyperbolic_secant():
    """p(lambda) = sech(lambda/2 + log sigma_data) / (2 pi): |dt / dlambda| of the path."""
    for sigma_data in (0.5, 1.0):
        path = MatchedEDM(sigma_data=sigma_data)
        expected = 1 / torch.cosh(path.log_snr(INNER) / 2 + math.log(sigma_data)) / (2 * math.pi)
        torch.testing.assert_close(-1 / path.d_log_snr(INNER), expected)


def test_ldm_linear_is_the_product_of_the_betas():
    """Sec. 2, written out: beta_k = (sqrt(beta_0) + k/(T-1) (sqrt(beta_T-1) - sqrt(beta_0)))^2."""
    product, expected = 1.0, []
    for k in range(1000):
        root = math.sqrt(0.00085) + k / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))
        product *= 1.0 - root**2
        expected.append(math.sqrt(product))
    knots = torch.arange(1, 1001, dtype=torch.float64) / 1000
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(LDMLinear().a(knots), wanted, rtol=1e-11, atol=0)
    torch.testing.assert_close(LDMLinear().b(knots), (1 - wanted**2).sqrt(), rtol=1e-9, atol=0)


def test_between_its_steps_the_log_of_ldm_linear_is_linear():
    path = LDMLinear()
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    before, between, after = (path.a(t + part / 1000).log() for part in (0.0, 0.25, 1.0))
    torch.testing.assert_close(between, 0.75 * before + 0.25 * after, rtol=1e-9, atol=1e-12)


def test_ldm_linear_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(LDMLinear().a(t).square().float(), theirs.alphas_cumprod)


def test_what_is_noisier_than_its_end_is_the_end_of_ldm_linear():
    path = LDMLinear()
    sigma = torch.tensor([path.noisiest, 0.97, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.time_at(sigma), torch.ones_like(sigma))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Cosine, {"last": 0.0}, r"last 0.0 must lie in \(0, 1\]"),
        (Cosine, {"last": 1.1}, r"last 1.1"),
        (LDMLinear, {"beta_start": 0.0}, "beta_start 0.0 and beta_end 0.012 must satisfy"),
        (LDMLinear, {"beta_end": 1.0}, "beta_start 0.00085 and beta_end 1.0"),
        (LDMLinear, {"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        (LDMLinear, {"steps": 1}, "steps=1 must be a whole number of at least 2"),
        (EDM, {"P_s": 0.0}, "EDM: P_s=0.0 must be a finite number"),
        (EDM, {"P_s": -1.0}, "EDM: P_s=-1.0 must be a finite number"),
        (EDM, {"P_s": float("nan")}, "EDM: P_s=nan must be a finite number"),
        (EDM, {"P_m": float("inf")}, "EDM: P_m inf must be finite"),
        (EDM, {"sigma_max": 0.0}, "EDM: sigma_max=0.0 must be a finite number"),
        (EDM, {"sigma_max": float("nan")}, "EDM: sigma_max=nan must be a finite number"),
        (
            MatchedEDM,
            {"sigma_data": 0.0},
            "MatchedEDM: sigma_data=0.0 must be a finite number",
        ),
        (
            MatchedEDM,
            {"sigma_data": float("nan")},
            "MatchedEDM: sigma_data=nan must be a finite number",
        ),
        (
            MatchedEDM,
            {"sigma_max": -80.0},
            "MatchedEDM: sigma_max=-80.0 must be a finite number",
        ),
    ],
)
def test_impossible_paths_are_refused(kind: type[Path], arguments, message):
    with pytest.raises(UserError, match=message):
        kind(**arguments)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
