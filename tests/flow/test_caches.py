"""Caches on velocities of which everything is known; on networks, see tests/test_caches.py."""

from functools import partial

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.cached_velocity import Residuals, relative_change
from mmdit.flow.caches import SOLVERS, FirstBlockCache, TaylorCache, expect_cacheable
from mmdit.flow.condition import Condition
from mmdit.flow.guidance import ClassifierFreeGuidance, GuidanceInterval, SkipLayerGuidance
from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import euler, euler_ancestral, heun, midpoint, stochastic
from mmdit.flow.transitions import FlowSDE

GENERATOR = torch.Generator().manual_seed(0)
Z = torch.randn(2, 3, 4, 4, generator=GENERATOR, dtype=torch.float64)
POSITIVE, NEGATIVE = (
    Condition(torch.full((2, 3), c, dtype=torch.float64), torch.zeros(2, 4, 5)) for c in (1.0, 2.0)
)
GRID = Shift(alpha=3.0).grid(12).double()  # of uneven steps


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Polynomial:
    """A velocity sum_k (k + 1) c t^k of a degree, which records where it is evaluated."""

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.evaluated: list[tuple[int, float]] = []  # batch size and time
        self.without: list[Polynomial] = []

    def __call__(self, z, t, condition):
        self.evaluated.append((len(z), t))
        c = condition.c_vec[:, :1, None, None]
        return sum((k + 1) * c * t**k for k in range(self.degree + 1)).expand_as(z)

    def skipping(self, layers):
        self.without.append(Polynomial(self.degree))
        return self.without[-1]


def followed(cache, velocity, guidance=None, grid=GRID):
    """The velocities along the grid."""
    guidance = ClassifierFreeGuidance(scale=3.0) if guidance is None else guidance
    source = velocity if cache is None else cache.cached(velocity, grid)
    guided = guidance(source, POSITIVE, NEGATIVE, grid, len(grid) - 1)
    return torch.stack([guided(Z, t) for t in grid[:-1].tolist()])


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("order", range(5))
def test_a_forecast_is_exact_for_polynomials_of_its_order_and_of_no_higher(order, interval):
    cache = TaylorCache(interval=interval, order=order)
    exact, found = followed(None, Polynomial(order)), followed(cache, Polynomial(order))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    exact, found = followed(None, Polynomial(order + 1)), followed(cache, Polynomial(order + 1))
    assert (found - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("cache", "steps"),
    [
        (TaylorCache(interval=3, order=1), [0, 1, 4, 7, 10]),
        (TaylorCache(interval=3, order=0), [0, 3, 6, 9]),
        (TaylorCache(interval=4, order=2), [0, 1, 2, 6, 10]),
        (TaylorCache(interval=3, order=1, warmup_steps=4), [0, 1, 2, 3, 6, 9]),
        (TaylorCache(interval=10_000, order=1), [0, 1]),
        (TaylorCache(interval=1, order=4), list(range(12))),
        (TaylorCache(interval=5, warmup_steps=10_000), list(range(12))),
    ],
)
def test_the_network_is_evaluated_every_few_steps(cache, steps):
    velocity = Polynomial(3)
    found = followed(cache, velocity)
    assert velocity.evaluated == [(4, GRID[i].item()) for i in steps]
    exact = followed(None, Polynomial(3))
    assert all(torch.equal(found[i], exact[i]) for i in steps)


def test_order_zero_repeats_the_latest_velocity():
    found = followed(TaylorCache(interval=3, order=0), Polynomial(2))
    assert all(torch.equal(found[i], found[i - i % 3]) for i in range(12))


def test_guidance_that_changes_what_it_evaluates_starts_anew():
    """A forecast from before a guidance interval would be one from far away."""
    guidance = GuidanceInterval(inner=ClassifierFreeGuidance(scale=3.0), low=0.4, high=0.92)
    velocity = Polynomial(1)
    found = followed(TaylorCache(interval=3, order=1), velocity, guidance)
    inside = [i for i, t in enumerate(GRID[:-1].tolist()) if 0.4 < t <= 0.92]
    first, last = inside[0], inside[-1]
    assert 1 < first < last < 10
    at = [GRID.tolist().index(t) for _, t in velocity.evaluated]
    assert {0, 1, first, first + 1, last + 1} <= {*at} and len(at) < 12
    assert [size for (size, _), i in zip(velocity.evaluated, at, strict=True)] == [
        4 if i in inside else 2 for i in at
    ]
    torch.testing.assert_close(found, followed(None, Polynomial(1), guidance))


def test_a_network_without_some_blocks_is_forecast_by_itself():
    guidance = SkipLayerGuidance(
        inner=ClassifierFreeGuidance(scale=3.0), layers=[1], start=0.0, end=1.0
    )
    velocity = Polynomial(1)
    found = followed(TaylorCache(interval=4, order=1), velocity, guidance)
    (weaker,) = velocity.without
    assert [t for _, t in weaker.evaluated] == [GRID[i].item() for i in (1, 2, 6, 10)]
    torch.testing.assert_close(found, followed(None, Polynomial(1), guidance))


def test_nothing_is_remembered_from_one_integration_to_the_next():
    cache, velocity = TaylorCache(interval=3, order=1), Polynomial(2)
    first = followed(cache, velocity)
    count = len(velocity.evaluated)
    velocity.degree = 0
    followed(cache, velocity)
    velocity.degree = 2
    assert torch.equal(followed(cache, velocity), first)
    assert len(velocity.evaluated) == 3 * count


def test_a_second_evaluation_in_a_step_is_made_and_not_remembered():
    """As a guidance might need, at other latents than those of the trajectory."""
    once, twice = Polynomial(1), Polynomial(1)
    cache, found = TaylorCache(interval=3, order=1), []
    for velocity, times in ((once, 1), (twice, 2)):
        cached = cache.cached(velocity, GRID)
        for t in GRID[:-1].tolist():
            found.append([cached(Z, t, POSITIVE) for _ in range(times)][-1])
    assert all(torch.equal(*pair) for pair in zip(found[:12], found[12:], strict=True))
    assert len(once.evaluated) == 5 and len(twice.evaluated) == 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_one_evaluation_per_step_are_accepted(solver):
    expect_cacheable(solver)
    expect_cacheable(partial(solver))
    velocity = TaylorCache(interval=2).cached(Polynomial(1), GRID)
    solver(lambda z, t: velocity(z, t, POSITIVE), Z, GRID)


@pytest.mark.parametrize(
    "solver",
    [heun, midpoint, euler_ancestral, partial(stochastic, transition=FlowSDE()), lambda *_: None],
)
def test_other_solvers_are_refused(solver):
    with pytest.raises(UserError, match=r"does not work with a cache.* euler, dpmpp_2m"):
        expect_cacheable(solver)


def test_times_between_those_of_the_grid_are_refused():
    velocity = TaylorCache().cached(Polynomial(1), GRID)
    with pytest.raises(UserError, match=r"t=0\.123, which is not one of them"):
        velocity(Z, 0.123, POSITIVE)
    with pytest.raises(UserError, match="not one of them"):  # of Heun's second evaluation
        midpoint(lambda z, t: velocity(z, t, POSITIVE), Z, GRID)


def test_gradients_are_refused():
    velocity = TaylorCache().cached(Polynomial(1), GRID)
    with torch.enable_grad(), pytest.raises(UserError, match="for sampling, not for training"):
        velocity(Z, 1.0, POSITIVE)


@pytest.mark.parametrize(
    ("cache", "values", "message"),
    [
        (FirstBlockCache, {"threshold": -0.1}, "threshold=-0.1 must be a finite number of at lea"),
        (FirstBlockCache, {"threshold": 1.5}, "threshold=1.5 must be a finite number.* at most 1"),
        (FirstBlockCache, {"threshold": float("nan")}, "threshold=nan must be a finite number"),
        (FirstBlockCache, {"threshold": "0.1"}, "threshold='0.1' must be a number"),
        (FirstBlockCache, {"warmup_steps": -1}, "warmup_steps=-1 must be a whole number from 0"),
        (FirstBlockCache, {"max_consecutive": 0}, "max_consecutive=0 must be a whole number from"),
        (FirstBlockCache, {"treshold": 0.1}, "no argument 'treshold'. Did you mean threshold"),
        (TaylorCache, {"interval": 0}, "interval=0 must be a whole number from 1"),
        (TaylorCache, {"interval": 2.5}, "interval=2.5 must be a whole number"),
        (TaylorCache, {"order": 5}, "order=5 must be a whole number from 0 to 4"),
        (TaylorCache, {"order": -1}, "order=-1 must be a whole number from 0 to 4"),
        (TaylorCache, {"warmup_steps": True}, "warmup_steps=True must be a whole number"),
    ],
)
def test_values_out_of_range_are_refused(cache, values, message):
    with pytest.raises(UserError, match=f"{cache.__name__}.*{message}"):
        cache(**values)


# Residuals


def tokens(*values: float) -> torch.Tensor:
    """Of samples whose values are all the same, (b, 2, 3)."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None].expand(-1, 2, 3).clone()


def test_samples_are_evaluated_in_full_where_the_first_residual_has_changed():
    residuals = Residuals(0.25)
    assert residuals.choose(tokens(0, 0, 0), tokens(1, 1, 1)).tolist() == [0, 1, 2]
    assert torch.equal(residuals.complete(tokens(11, 21, 31)), tokens(11, 21, 31))
    # Changes of 0.125, 0.5 and 0.125 of the residual; the tokens before the block do not matter.
    assert residuals.choose(tokens(5, 0, 0), tokens(6.125, 1.5, 0.875)).tolist() == [1]
    assert residuals.share == pytest.approx(1 / 3)
    assert torch.equal(residuals.complete(tokens(2)), tokens(16.125, 2, 30.875))
    # The first is compared with its latest full evaluation, the second with the one just made.
    assert residuals.choose(tokens(0, 0, 0), tokens(1.25, 1.5, 1)).tolist() == [0]
    assert torch.equal(residuals.complete(tokens(7)), tokens(7, 2, 31))


def test_both_sides_of_a_latent_are_evaluated_where_one_has_changed():
    residuals = Residuals(0.25)
    residuals.sides = 2
    assert len(residuals.choose(tokens(0, 0, 0, 0), tokens(1, 1, 1, 1))) == 4
    residuals.complete(tokens(2, 2, 2, 2))
    assert residuals.choose(tokens(0, 0, 0, 0), tokens(1, 1, 1, 1.5)).tolist() == [1, 3]
    residuals.complete(tokens(2, 2))
    residuals.sides = 1
    assert residuals.choose(tokens(0, 0, 0, 0), tokens(1, 1, 1.5, 1.5)).tolist() == [2]


def test_reuse_is_limited_and_can_be_forbidden():
    residuals, found = Residuals(1.0, max_consecutive=2), []
    for step in range(9):
        residuals.full = step == 4
        residuals.choose(tokens(0, 0), tokens(1, 1))
        found.append(residuals.share)
        residuals.complete(tokens(*[3.0] * len(residuals.rows)))
    assert found == [1, 0, 0, 1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_cannot_be_compared_is_evaluated_in_full(value):
    residuals = Residuals(1.0)
    for _ in range(2):
        assert residuals.choose(tokens(0, 0), tokens(value, 1)).tolist()[0] == 0
        residuals.complete(tokens(*[3.0] * len(residuals.rows)))
    assert residuals.rows.tolist() == [0]


def test_the_relative_change_is_that_of_each_sample():
    old = torch.randn(3, 4, 5, generator=GENERATOR)
    new = old * torch.tensor([1.0, 1.5, -1.0])[:, None, None]
    torch.testing.assert_close(relative_change(new, old), torch.tensor([0.0, 0.5, 2.0]))
    assert relative_change(new.bfloat16(), old.bfloat16()).dtype == torch.float32


def test_threshold_zero_reuses_nothing_even_where_nothing_changes():
    residuals = Residuals(0.0)
    for _ in range(3):
        assert len(residuals.choose(tokens(0, 0), tokens(1, 1))) == 2
        residuals.complete(tokens(3, 3))


def test_euler_with_a_forecast_of_a_line_is_euler():
    """The whole integration, not only its velocities."""
    velocity = TaylorCache(interval=4, order=1).cached(Polynomial(1), GRID)
    found = euler(lambda z, t: velocity(z, t, POSITIVE), Z, GRID)
    exact = Polynomial(1)
    torch.testing.assert_close(found, euler(lambda z, t: exact(z, t, POSITIVE), Z, GRID))
