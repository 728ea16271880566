import math

import pytest
import torch

from mmdit.errors import UserError
from mmdit.metrics.reconstruction import psnr, ssim


def images(seed: int = 0, size: int = 16, count: int = 2) -> torch.Tensor:
    """Noise on a ramp, away from black and white."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(70, 180, size)[None, :, None, None]
    return (ramp + 10 * torch.randn(count, size, size, 3, generator=generator)).byte()


def noisy(truth: torch.Tensor, strength: float) -> torch.Tensor:
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9))
    return (truth + strength * noise).round().clamp(0, 255).byte()


def flat(value: int) -> torch.Tensor:
    return torch.full((1, 12, 14, 3), value, dtype=torch.uint8)


def test_equal_images_are_perfect():
    assert psnr(images(), images()) == math.inf
    assert ssim(images(), images()) == pytest.approx(1, abs=1e-12)


def test_psnr_of_one_level_everywhere():
    assert psnr(flat(100), flat(101)) == pytest.approx(20 * math.log10(255))


def test_ssim_of_flat_images_compares_their_brightness():
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(flat(100), flat(150)) == pytest.approx(expected)


def test_ssim_equals_its_definition_by_sums():
    """One place of the window, one channel: weighted means, variances and covariance."""
    x, y = images(0, 11, 1)[..., :1], images(1, 11, 1)[..., :1]
    weights = [
        [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
        for i in range(11)
    ]
    total = sum(map(sum, weights))

    def mean(a: torch.Tensor, b: torch.Tensor | None = None) -> float:
        places = [(i, j) for i in range(11) for j in range(11)]
        values = [
            a[0, i, j, 0].item() * (1 if b is None else b[0, i, j, 0].item()) for i, j in places
        ]
        return sum(weights[i][j] * v for (i, j), v in zip(places, values, strict=True)) / total

    mu, nu = mean(x), mean(y)
    var, war, cov = mean(x, x) - mu**2, mean(y, y) - nu**2, mean(x, y) - mu * nu
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mu * nu + c1) * (2 * cov + c2) / ((mu**2 + nu**2 + c1) * (var + war + c2))
    assert ssim(x, y) == pytest.approx(expected, rel=1e-9)


def test_ssim_is_symmetric_and_the_mean_of_images_and_channels():
    x, y = images(0), images(1)
    assert ssim(x, y) == pytest.approx(ssim(y, x), rel=1e-12)
    parts = [
        ssim(x[i : i + 1, ..., c : c + 1], y[i : i + 1, ..., c : c + 1])
        for i in range(2)
        for c in range(3)
    ]
    assert ssim(x, y) == pytest.approx(sum(parts) / 6, rel=1e-9)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_more_noise_is_worse(measure):
    values = [measure(noisy(images(), strength), images()) for strength in (2, 8, 32)]
    assert values[0] > values[1] > values[2]


def test_ssim_of_an_inverted_image_is_negative():
    assert ssim(255 - images(), images()) < 0


def test_ssim_tells_structure_where_psnr_sees_the_same_error():
    """A shift of the brightness keeps the structure, noise of the same size does not."""
    truth = images()
    brighter, noise = truth + 12, noisy(truth, 12)
    assert psnr(brighter, truth) == pytest.approx(psnr(noise, truth), abs=0.3)
    assert ssim(brighter, truth) > ssim(noise, truth) + 0.05


def test_images_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"\(2, 10, 10, 3\) must be .* at least 11 pixels"):
        ssim(images(size=10), images(size=10))
    with pytest.raises(UserError, match=r"\(1, 16, 16, 3\) must have the shape \(2, 16, 16, 3\)"):
        ssim(images(count=1), images())
