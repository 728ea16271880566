import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.guidance import ClassifierFreeGuidance, SkipLayerGuidance
from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import dpmpp_2m, euler, heun, midpoint

GENERATOR = torch.Generator().manual_seed(0)
POSITIVE = Condition(
    torch.randn(2, 3, generator=GENERATOR), torch.randn(2, 4, 5, generator=GENERATOR)
)
NEGATIVE = Condition(
    torch.randn(2, 3, generator=GENERATOR), torch.randn(2, 4, 5, generator=GENERATOR)
)
Z = torch.randn(2, 3, 4, 4, generator=GENERATOR)
TIME = 0.7
GRID = Shift().grid(10)


def velocity(z, t, condition):
    """Depends on every argument, sample by sample."""
    c_vec, c_ctxt = condition
    assert len(z) == len(c_vec) == len(c_ctxt)
    return t * z + c_vec[:, :, None, None] + c_ctxt.mean(dim=(1, 2))[:, None, None, None]


def guided(scale, velocity=velocity):
    guide = ClassifierFreeGuidance(scale=scale)
    return guide(velocity, POSITIVE, NEGATIVE, GRID, 10)(Z, TIME)


def test_scale_one_is_the_conditional_velocity_and_computes_nothing_else():
    batches = []

    def counted(z, t, condition):
        batches.append(len(z))
        return velocity(z, t, condition)

    assert torch.equal(guided(1.0, counted), velocity(Z, TIME, POSITIVE))
    assert batches == [2]
    guided(2.0, counted)
    assert batches == [2, 4]


def test_scale_zero_is_the_unconditional_velocity():
    torch.testing.assert_close(guided(0.0), velocity(Z, TIME, NEGATIVE))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 4.5])
def test_guidance_is_linear_in_its_scale(scale):
    expected = guided(0.0) + scale * (guided(1.0) - guided(0.0))
    torch.testing.assert_close(guided(scale), expected)


def test_the_same_condition_on_both_sides_changes_nothing():
    guide = ClassifierFreeGuidance(scale=7.0)
    torch.testing.assert_close(
        guide(velocity, POSITIVE, POSITIVE, GRID, 10)(Z, TIME), velocity(Z, TIME, POSITIVE)
    )


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_guidance_is_computed_in_float32(scale):
    def half(z, t, condition):
        return velocity(z, t, condition).bfloat16()

    result = guided(scale, half)
    assert result.dtype == torch.float32
    cond, uncond = half(Z, TIME, POSITIVE).float(), half(Z, TIME, NEGATIVE).float()
    torch.testing.assert_close(result, uncond + scale * (cond - uncond))


class Layered:
    """A velocity that is weaker by a tenth for each block passed by, and counts its batches."""

    def __init__(self, *, weaker: float = 1.0) -> None:
        self.weaker = weaker
        self.batches: list[int] = []
        self.without: dict[tuple[int, ...], Layered] = {}

    def __call__(self, z, t, condition):
        self.batches.append(len(z))
        return self.weaker * velocity(z, t, condition)

    def skipping(self, layers):
        return self.without.setdefault(tuple(layers), Layered(weaker=1 - len(layers) / 10))


def skip_layer(network, grid=GRID, steps=10, **arguments):
    guide = SkipLayerGuidance(**{"start": 0.05, "end": 0.3, **arguments})
    return guide(network, POSITIVE, NEGATIVE, grid, steps)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_skip_layer_guidance_adds_its_term_inside_the_window_only(scale):
    network = Layered()
    v = skip_layer(network, scale=scale, skip_scale=2.5, layers=(3, 4))
    cond, uncond = (velocity(Z, 0.85, side) for side in (POSITIVE, NEGATIVE))
    plain = uncond + scale * (cond - uncond)
    torch.testing.assert_close(v(Z, 0.85), plain + 2.5 * (cond - 0.8 * cond))
    assert list(network.without) == [(3, 4)]
    assert network.batches == [2 if scale == 1.0 else 4]
    for outside in (1.0, 0.95, 0.3):
        cond, uncond = (velocity(Z, outside, side) for side in (POSITIVE, NEGATIVE))
        torch.testing.assert_close(v(Z, outside), uncond + scale * (cond - uncond))


@pytest.mark.parametrize(
    ("solver", "skipped"),
    # Steps 1 and 2 are inside: 0.5 and 3 are not whole, or not strictly less.
    [(euler, 2), (midpoint, 4), (heun, 4), (dpmpp_2m, 2)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_solver_asks_for_the_skipped_network_inside_the_window_only(solver, skipped):
    network = Layered()
    solver(skip_layer(network), Z, GRID)
    assert len(network.skipping((7, 8, 9)).batches) == skipped


def test_the_window_counts_the_steps_that_are_left_against_all_steps():
    """Half a grid of 20: steps 10 to 19 are left, of which the window has 2 to 5."""
    network = Layered()
    grid = Shift().grid(20)[10:]
    v = skip_layer(network, grid, 20)
    times = grid[:-1].tolist()
    for t in times:
        v(Z, t)
    assert len(network.skipping((7, 8, 9)).batches) == 4
    network.skipping((7, 8, 9)).batches.clear()
    v(Z, times[1])
    assert network.skipping((7, 8, 9)).batches == []
    v(Z, times[2])
    assert network.skipping((7, 8, 9)).batches == [2]


def test_an_empty_window_is_classifier_free_guidance():
    for grid in (GRID, GRID[-1:]):
        guided = skip_layer(Layered(), grid, scale=3.0, start=0.2, end=0.2)
        expected = ClassifierFreeGuidance(scale=3.0)(velocity, POSITIVE, NEGATIVE, grid, 10)
        torch.testing.assert_close(guided(Z, 0.8), expected(Z, 0.8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ()}, "must be a list"),
        ({"layers": 7}, "layers 7 must be a list"),
        ({"start": 0.5, "end": 0.2}, "start 0.5 and end 0.2"),
        ({"end": 20.0}, "fractions"),
    ],
)
def test_impossible_windows_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SkipLayerGuidance(**arguments)
