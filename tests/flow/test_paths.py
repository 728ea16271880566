import pytest
import torch

from mmdit.flow.paths import RectifiedFlow

PATHS = [RectifiedFlow()]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
INNER = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)


@each_path
@pytest.mark.parametrize(("value", "derivative"), [("a", "da"), ("b", "db")])
def test_derivatives_match_autograd(path, value, derivative):
    t = INNER.clone().requires_grad_()
    (slope,) = torch.autograd.grad(getattr(path, value)(t).sum(), t)
    torch.testing.assert_close(getattr(path, derivative)(INNER), slope)


@each_path
def test_a_path_runs_from_data_to_noise(path):
    log_snr = path.log_snr(INNER)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr, (path.a(INNER) ** 2 / path.b(INNER) ** 2).log())
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert path.b(ends)[0] == 0 and path.a(ends)[0] == 1
    assert path.a(ends)[1] == 0 and path.b(ends)[1] == 1


@each_path
def test_velocity_is_the_derivative_of_the_interpolation(path):
    x_0, epsilon = torch.randn(2, 3, 2, 4, 4, generator=generator(), dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    h = 1e-5
    ahead, behind = (path.interpolate(x_0, epsilon, t + step) for step in (h, -h))
    torch.testing.assert_close(path.velocity(x_0, epsilon, t), (ahead - behind) / (2 * h))


@each_path
@pytest.mark.parametrize("method", ["interpolate", "velocity"])
@pytest.mark.parametrize("shape", [(4, 4, 4, 4), (4, 4), (4,)], ids=str)
def test_each_sample_has_its_own_time(path, method, shape):
    # Equal sides, so that a coefficient broadcast along another axis would still run.
    x_0, epsilon = torch.randn(2, *shape, generator=generator())
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    together = getattr(path, method)(x_0, epsilon, t)
    assert together.shape == shape
    for i in range(4):
        alone = getattr(path, method)(x_0[i : i + 1], epsilon[i : i + 1], t[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_rectified_flow_is_the_straight_line():
    x_0, epsilon = torch.randn(2, 3, 2, 4, 4, generator=generator())
    t = torch.tensor([0.0, 0.25, 1.0])
    z_t = RectifiedFlow().interpolate(x_0, epsilon, t)
    assert torch.equal(z_t[0], x_0[0])
    torch.testing.assert_close(z_t[1], 0.75 * x_0[1] + 0.25 * epsilon[1])
    assert torch.equal(z_t[2], epsilon[2])
    torch.testing.assert_close(RectifiedFlow().velocity(x_0, epsilon, t), epsilon - x_0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
