import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.paths import EDM, Cosine, MatchedEDM, RectifiedFlow
from mmdit.flow.predictions import Epsilon, FPrediction, V, Velocity
from tests.variants import variants

T = torch.tensor([0.0103, 0.1, 0.5003, 0.9, 0.9899], dtype=torch.float64)


each_prediction = pytest.mark.each("prediction")


def paths_of(prediction):
    """All that it is made for."""
    paths = [build() for build in variants("path").values()]
    return [path for path in paths if prediction.misfit(path) is None]


def predictions_on(path):
    predictions = [build() for build in variants("prediction").values()]
    return [prediction for prediction in predictions if prediction.misfit(path) is None]


def pair(dtype=torch.float64):
    """Data, noise and times."""
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, len(T), 2, 4, 4, generator=generator, dtype=dtype)
    return x_0, epsilon, T.to(dtype)


def assert_equal(actual, expected):
    """To 1e-10, relative to the size of the values."""
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < 1e-10


@each_prediction
def test_the_target_reads_back_as_all_that_it_was_made_of(prediction):
    for path in paths_of(prediction):
        x_0, epsilon, t = pair()
        z_t = path.interpolate(x_0, epsilon, t)
        output = prediction.target(path, x_0, epsilon, t)
        assert_equal(prediction.x_0(path, output, z_t, t), x_0)
        assert_equal(prediction.epsilon(path, output, z_t, t), epsilon)
        assert_equal(prediction.velocity(path, output, z_t, t), path.velocity(x_0, epsilon, t))
        assert_equal(prediction.straight_velocity(path, output, z_t, t), epsilon - x_0)


@each_prediction
def test_any_output_comes_back_from_the_pair_it_speaks_of(prediction):
    """Conversions are inverses of the target for any z_t and output, of one pair or not."""
    for path in paths_of(prediction):
        z_t, output, t = pair()
        x_0 = prediction.x_0(path, output, z_t, t)
        epsilon = prediction.epsilon(path, output, z_t, t)
        assert_equal(path.interpolate(x_0, epsilon, t), z_t)
        assert_equal(prediction.target(path, x_0, epsilon, t), output)


@each_prediction
def test_a_prediction_turns_into_any_other_and_back(prediction):
    for path in paths_of(prediction):
        z_t, output, t = pair()
        pair_of_it = [getattr(prediction, of)(path, output, z_t, t) for of in ("x_0", "epsilon")]
        for other in predictions_on(path):
            turned = other.target(path, *pair_of_it, t)
            back = [getattr(other, of)(path, turned, z_t, t) for of in ("x_0", "epsilon")]
            assert_equal(prediction.target(path, *back, t), output)


@each_prediction
def test_an_error_of_the_noise_is_one_of_the_output_times_a_over_the_determinant(prediction):
    for path in paths_of(prediction):
        z_t, output, t = pair()
        error = torch.ones_like(output)
        of_noise = prediction.epsilon(path, output + error, z_t, t)
        of_noise = of_noise - prediction.epsilon(path, output, z_t, t)
        factor = path.a(t) / prediction.determinant(path, t)
        assert_equal(of_noise, factor[:, None, None, None] * error)


@each_prediction
def test_each_sample_is_read_at_its_own_time(prediction):
    for path in paths_of(prediction):
        z_t, output, t = pair()
        together = prediction.straight_velocity(path, output, z_t, t)
        for i in range(len(t)):
            one = slice(i, i + 1)
            alone = prediction.straight_velocity(path, output[one], z_t[one], t[one])
            torch.testing.assert_close(together[one], alone)


def test_velocity_on_the_straight_path_points_from_data_to_noise():
    """Eq. 14."""
    x_0, epsilon, t = pair(torch.float32)
    target = Velocity().target(RectifiedFlow(), x_0, epsilon, t)
    torch.testing.assert_close(target, epsilon - x_0)


def test_velocity_on_the_straight_path_is_the_output_bit_for_bit():
    t = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output, z_t = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(1))
    read = Velocity().straight_velocity(RectifiedFlow(), output, z_t, t)
    assert read.dtype == torch.float32 and torch.equal(read, output)


def test_v_turns_the_pair_by_a_right_angle_on_the_cosine_path():
    """Salimans & Ho 2022: v is the derivative of z along the angle, pi t / 2."""
    x_0, epsilon, t = pair()
    v = V().target(Cosine(), x_0, epsilon, t)
    assert_equal(v, Cosine().velocity(x_0, epsilon, t) * 2 / torch.pi)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("path", [EDM(), MatchedEDM()], ids=lambda path: type(path).__name__)
def test_the_f_prediction_is_the_preconditioning_of_edm(path, sigma_data):
    """Table 1 of Karras et al. 2022: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)."""
    x_0, epsilon, t = pair()
    prediction = FPrediction(sigma_data=sigma_data)
    z_t = path.interpolate(x_0, epsilon, t)
    sigma = path.b(t)[:, None, None, None]
    total = sigma**2 + sigma_data**2
    shown, time = prediction.inputs(path, z_t, t)
    assert_equal(shown, z_t / total.sqrt())
    assert_equal(time, path.b(t).log() / 4)
    target = prediction.target(path, x_0, epsilon, t)
    c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
    assert_equal(c_skip * z_t + c_out * target, x_0)
    output = epsilon.flip(0)
    assert_equal(prediction.x_0(path, output, z_t, t), c_skip * z_t + c_out * output)


def test_what_edm_shows_and_asks_has_unit_variance_at_every_noise_level():
    path, prediction, n = EDM(), FPrediction(sigma_data=0.5), 20_000
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, len(T), n, generator=generator, dtype=torch.float64)
    x_0 = 0.5 * x_0
    shown, _ = prediction.inputs(path, path.interpolate(x_0, epsilon, T), T)
    target = prediction.target(path, x_0, epsilon, T)
    for values in (shown, target):
        assert values.var(dim=1).tolist() == pytest.approx([1.0] * len(T), abs=0.05)


@each_prediction
def test_what_is_shown_is_the_latent_in_some_unit_and_tells_its_time(prediction):
    """Each sample in its own unit, and other times as other numbers."""
    for path in paths_of(prediction):
        z_t, _, t = pair()
        shown, time = prediction.inputs(path, z_t, t)
        assert shown.shape == z_t.shape and time.shape == t.shape
        units = (shown / z_t).flatten(1)
        assert_equal(units, units[:, :1].expand_as(units))
        assert (time.diff() > 0).all() or (time.diff() < 0).all()


@pytest.mark.each("path")
@pytest.mark.parametrize("prediction", [Velocity(), Epsilon(), V()], ids=lambda p: type(p).__name__)
def test_all_but_edm_are_shown_the_latent_and_its_time(path, prediction):
    z_t, _, t = pair()
    shown, time = prediction.inputs(path, z_t, t)
    assert shown is z_t and time is t


@pytest.mark.parametrize("sigma_data", [0.0, -0.5, float("nan"), float("inf")])
def test_the_data_of_edm_must_spread(sigma_data):
    with pytest.raises(
        UserError, match=f"FPrediction: sigma_data={sigma_data} must be a finite number"
    ):
        FPrediction(sigma_data=sigma_data)
