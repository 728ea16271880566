import math

import pytest
import torch

from mmdit.errors import UserError
from mmdit.metrics.distances import (
    Moments,
    clip_score,
    frechet_distance,
    kernel_distance,
    matrix_root,
)

D = 6


def normal(count: int, seed: int, width: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def mixed(count: int, seed: int) -> torch.Tensor:
    """Correlated features with a mean."""
    return normal(count, seed) @ normal(D, 99) + 0.5


def rotation(seed: int = 3) -> torch.Tensor:
    return torch.linalg.qr(normal(D, seed)).Q


def exact(covariance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Features whose sample moments are these, to rounding."""
    raw = normal(50, 7)
    raw = raw - raw.mean(0)
    whitener = torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / 49)).T
    return raw @ whitener @ matrix_root(covariance) + mean


# Frechet


def test_equal_sets_have_no_distance():
    assert abs(frechet_distance(mixed(40, 0), mixed(40, 0))) < 1e-9


def test_distance_is_symmetric():
    a, b = mixed(40, 0), 2 * normal(30, 1) - 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1


def test_a_shift_of_the_mean_counts_with_its_square():
    a, shift = mixed(40, 0), torch.arange(D, dtype=torch.float64)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_distance_does_not_change_under_rotation():
    a, b, q = mixed(40, 0), normal(30, 1), rotation()
    assert frechet_distance(a @ q, b @ q) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_distance_scales_with_the_square_of_the_features():
    a, b = mixed(40, 0), normal(30, 1)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize(("least", "error"), [(0.5, 1e-9), (0.0, 1e-6)])
def test_commuting_gaussians_have_the_closed_form(least, error):
    """For N(m, diag p) and N(k, diag q): |m - k|^2 + sum (sqrt p - sqrt q)^2.

    Where a variance is zero, rounding leaves about 1e-16 of it, and the root of that is 1e-8.
    """
    p = torch.tensor([1.0, 4.0, 0.25, 9.0, 2.0, 1.0], dtype=torch.float64)
    q = torch.tensor([4.0, 4.0, 1.0, 1.0, least, 3.0], dtype=torch.float64)
    m, k = normal(2, 5)
    turn = rotation()
    a = exact(torch.diag(p), m) @ turn
    b = exact(torch.diag(q), k) @ turn
    expected = (m - k).square().sum() + (p.sqrt() - q.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=error)


def test_gaussians_that_do_not_commute_have_the_closed_form_of_two_dimensions():
    """tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2 matrices."""
    a = normal(20, 1, 2) @ torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    b = normal(20, 2, 2) @ torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    first, second = a.T.cov(), b.T.cov()
    product = first @ second
    assert (product - product.T).abs().max() > 0.1  # they do not commute
    shared = (product.trace() + 2 * product.det().sqrt()).sqrt()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    expected = (shift + first.trace() + second.trace() - 2 * shared).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_dimensions_have_a_distance_that_is_too_large():
    """The covariance is singular and the bias large; it falls as samples are added."""
    values = [frechet_distance(normal(n, 0), normal(n, 1)) for n in (3, 30, 3000)]
    assert values[0] > values[1] > values[2] > 0
    assert all(math.isfinite(value) for value in values)


def test_moments_in_parts_equal_those_of_all_at_once():
    features = mixed(100, 0) + 1e4  # where sums of squares would lose the covariance
    moments = Moments(D)
    for part in features.split([1, 0, 40, 7, 52]):
        moments.add(part)
    assert moments.count == 100
    torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)
    other = normal(30, 1)
    assert frechet_distance(moments, other) == pytest.approx(frechet_distance(features, other))


def test_matrix_root_squares_to_the_matrix():
    matrix = normal(9, 0).T @ normal(9, 0)
    root = matrix_root(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root, root.T)


# Kernel


def test_kernel_distance_equals_its_definition_by_loops():
    a, b = normal(4, 0), mixed(3, 1)

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x @ y) / D + 1) ** 3

    def inner(rows: torch.Tensor) -> float:
        n = len(rows)
        pairs = [k(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / len(pairs)

    cross = [k(x, y) for x in a for y in b]
    expected = inner(a) + inner(b) - 2 * sum(cross) / len(cross)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [5, 20])
def test_kernel_distance_of_one_distribution_is_zero_on_average_at_any_size(count):
    values = torch.tensor(
        [kernel_distance(normal(count, 2 * i), normal(count, 2 * i + 1)) for i in range(400)]
    )
    error = values.std() / len(values) ** 0.5
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 4 * error


def test_kernel_distance_tells_distributions_apart():
    same = kernel_distance(normal(400, 0), normal(400, 1))
    assert kernel_distance(normal(400, 0), normal(400, 1) + 0.5) > 20 * abs(same)


def test_kernel_distance_is_symmetric_and_does_not_change_under_rotation():
    a, b, q = normal(20, 0), mixed(30, 1), rotation()
    value = kernel_distance(a, b)
    assert kernel_distance(b, a) == pytest.approx(value, rel=1e-9)
    assert kernel_distance(a @ q, b @ q) == pytest.approx(value, rel=1e-9)


# CLIP score


def test_clip_score_is_the_mean_cosine():
    text = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    image = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 1.0]])
    assert clip_score(image, text) == pytest.approx((1 + 0 - math.sqrt(0.5)) / 3)


# Faults


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, clip_score])
def test_faulty_features_are_named(distance):
    good, bad = normal(4, 0), normal(4, 0)
    bad[2, 1] = float("nan")
    with pytest.raises(UserError, match="row 2 is not finite"):
        distance(good, bad)
    with pytest.raises(UserError, match=r"\(4, 2, 3\) must be features \(n, d\)"):
        distance(good.reshape(4, 2, 3), good)
    with pytest.raises(UserError, match=r"6.* and .*3.*must"):
        distance(good, normal(4, 0, 3))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_one_sample_is_too_few(distance):
    with pytest.raises(UserError, match=r"1 samples .*at least 2 are needed"):
        distance(normal(1, 0), normal(4, 1))
